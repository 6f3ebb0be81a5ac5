/* Stands in for uv.exe, python.exe, nvidia-smi.exe, git.exe and powershell.exe when scripts/test-windows-installer runs
   the installer under Wine: notes how it was called in %STAND_IN_LOG%, does what the installer relies on, and fails
   where the call has %STAND_IN_FAILS% in it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wchar.h>
#include <windows.h>

static wchar_t self[MAX_PATH], name[MAX_PATH], call[4096];

static int called_with(const wchar_t *words) { return wcsstr(call, words) != NULL; }

static void note_call(int count, wchar_t **words) { /* folder, name and words, in UTF-8, with tabs between */
    wchar_t here[MAX_PATH];
    GetCurrentDirectoryW(MAX_PATH, here);
    FILE *log = _wfopen(_wgetenv(L"STAND_IN_LOG"), L"ab");
    for (int at = -1; at < count; at++) {
        char text[8192];
        WideCharToMultiByte(CP_UTF8, 0, at < 0 ? here : at ? words[at] : name, -1, text, sizeof text, NULL, NULL);
        fprintf(log, at < 0 ? "%s" : "\t%s", text);
    }
    fprintf(log, "\n");
    fclose(log);
}

static int must_fail(void) {
    const wchar_t *words = _wgetenv(L"STAND_IN_FAILS");
    return words && called_with(words);
}

static void copy_self_to(const wchar_t *folder, const wchar_t *file) {
    wchar_t path[MAX_PATH] = L"";
    for (const wchar_t *at = folder; *at; at++) { /* every folder on the way */
        wcsncat(path, at, 1);
        if (at[1] == L'\\' || !at[1]) CreateDirectoryW(path, NULL);
    }
    wcscat(wcscat(path, L"\\"), file);
    CopyFileW(self, path, FALSE);
}

static void write_file(const wchar_t *path, const char *text) {
    FILE *file = _wfopen(path, L"wb");
    fputs(text, file);
    fclose(file);
}

static int act(void) {
    if (!wcscmp(name, L"uv") && called_with(L"uv venv")) {
        const wchar_t *project = called_with(L".venv") ? NULL : _wgetenv(L"UV_PROJECT_ENVIRONMENT");
        wchar_t folder[MAX_PATH];
        swprintf(folder, MAX_PATH, L"%ls\\Scripts", project ? project : L".venv");
        copy_self_to(folder, L"python.exe");
    }
    if (!wcscmp(name, L"uv") && called_with(L"uv export")) write_file(L".venv\\locked.txt", "numpy==2\n");
    if (!wcscmp(name, L"nvidia-smi")) {
        if (!_wgetenv(L"STAND_IN_GPU")) return 9; /* installed, but no GPU answers */
        printf("%ls\n", called_with(L"--query-gpu") ? _wgetenv(L"STAND_IN_GPU") : L"+---- a table ----+");
    }
    if (!wcscmp(name, L"python") && called_with(L"cuda")) return _wgetenv(L"STAND_IN_CUDA") == NULL;
    if (!wcscmp(name, L"python") && called_with(L"train.py fixed")) printf("started by %ls\n", _wgetenv(L"SIDESTEP_START"));
    if (!wcscmp(name, L"powershell")) {
        const wchar_t *chosen = _wgetenv(L"UV_INSTALL_DIR");
        wchar_t folder[MAX_PATH];
        swprintf(folder, MAX_PATH, L"%ls\\.local\\bin", _wgetenv(L"USERPROFILE"));
        if (!chosen) chosen = _wgetenv(L"XDG_BIN_HOME");
        copy_self_to(chosen ? chosen : folder, L"uv.exe");
    }
    if (!wcscmp(name, L"git") && called_with(L"pull") && _wgetenv(L"STAND_IN_NEW_INSTALLER"))
        CopyFileW(_wgetenv(L"STAND_IN_NEW_INSTALLER"), L"install_windows.bat", FALSE);
    return _wgetenv(L"STAND_IN_EXIT") && called_with(L"train.py") && !called_with(L"doctor") && !called_with(L"--version")
               ? _wtoi(_wgetenv(L"STAND_IN_EXIT")) : 0;
}

int wmain(int count, wchar_t **words) {
    GetModuleFileNameW(NULL, self, MAX_PATH);
    wcscpy(name, wcsrchr(self, L'\\') + 1);
    *wcsrchr(name, L'.') = 0;
    wcscpy(call, name);
    for (int at = 1; at < count; at++) wcscat(wcscat(call, L" "), words[at]);
    note_call(count, words);
    if (must_fail()) {
        fprintf(stderr, "stand-in: %ls does not work\n", name);
        return 1;
    }
    return act();
}
