@echo off
setlocal EnableExtensions DisableDelayedExpansion
rem Installs Side-Step for you alone: asks for no administrator, and writes to this folder and to uv's folders in your
rem profile. Run it again to update.
rem
rem   install_windows.bat [--yes] [--torch NAME]
rem     --yes         asks nothing, waits for no key, does not start the wizard
rem     --torch NAME  the torch build: auto (what fits the GPU), cpu, cu126, cu128, cu130, xpu, ...
set "HERE=%~dp0"
set "SELF=%~f0"
set "YES="
set "UPDATED="
set "TORCH="
set "TORCH_ARGUMENT="

:arguments
if "%~1"=="" goto folder
if /i "%~1"=="--yes" goto take_yes
if /i "%~1"=="--updated" goto take_updated
if /i "%~1"=="--torch" if not "%~2"=="" goto take_torch
set "WHY=The installer takes only --yes and --torch NAME."
set "WAY=Double-click it, or type install_windows.bat --yes"
goto failed
:take_yes
set "YES=--yes"
shift /1
goto arguments
:take_updated
set "UPDATED=1"
shift /1
goto arguments
:take_torch
set "TORCH=%~2"
set "TORCH_ARGUMENT=--torch %~2"
set "WHY=--torch needs a name."
set "WAY=For instance: install_windows.bat --torch cu126"
if "%TORCH:~0,1%"=="-" goto failed
shift /1
shift /1
goto arguments

:folder
title Installing Side-Step
if not defined UPDATED echo Installing Side-Step. Nothing here needs an administrator; run this again to update.
set "WHY=This folder cannot be opened."
set "WAY=Copy it to a folder of your own, for example in your profile, and run the installer there."
rem A pushd that works leaves the error level as it was, which after an update may be git's.
ver >nul
pushd "%HERE%" 2>nul
if %errorlevel% neq 0 goto failed
set "WHY=Side-Step's files do not lie beside this installer; it was probably started from inside the ZIP."
set "WAY=Right-click the ZIP, choose Extract All, then run the installer in the folder that appears."
if not exist "pyproject.toml" goto failed
if not exist "uv.lock" goto failed
set "WHY=This folder cannot be written."
set "WAY=Move Side-Step to a folder of your own, for example in your profile, and run the installer there."
call :check_writing 2>nul
if not exist "install-check.tmp" goto failed
del "install-check.tmp"

if "%HERE:OneDrive=%"=="%HERE%" goto path_length
set "UV_LINK_MODE=copy"
echo.
echo Note: this folder lies in OneDrive, which locks files and uploads gigabytes.
echo   Better: move Side-Step out of it, or pause OneDrive while it installs and trains.

:path_length
rem What is installed has paths of up to 140 characters inside this folder; Windows stops at 260.
if "%HERE:~110,1%"=="" goto update
reg query "HKLM\SYSTEM\CurrentControlSet\Control\FileSystem" /v LongPathsEnabled 2>nul | "%SystemRoot%\System32\find.exe" "0x1" >nul
if %errorlevel% equ 0 goto update
echo.
echo Note: the path of this folder is long, and Windows is not set to take long paths.
echo   If something fails below, move Side-Step to a shorter path, such as a folder in your profile.

:update
if defined UPDATED goto find_uv
if not exist ".venv" goto find_uv
echo.
if not exist ".git" goto update_by_zip
set "GIT="
for %%I in (git.exe) do set "GIT=%%~$PATH:I"
if not defined GIT goto update_without_git
echo Updating Side-Step.
rem This file may change under us: cmd reads the whole block before it begins, and ends in the new installer.
rem uv writes addresses into uv.lock, which would stand in the way.
(
  "%GIT%" checkout --quiet -- uv.lock
  "%GIT%" pull --ff-only
  if errorlevel 1 echo Note: Side-Step's own files could not be updated, for the reason above.
  popd
  "%SELF%" --updated %YES% %TORCH_ARGUMENT%
)
:update_by_zip
echo Note: this folder came as a ZIP, so Side-Step's own files stay as they are. To update them, extract a new ZIP over
echo   this folder and run this again; your songs, runs and settings stay.
goto find_uv
:update_without_git
echo Note: there is no git here, so Side-Step's own files stay as they are. To update them, run: git pull

:find_uv
rem Named, since uv's installer goes by XDG_BIN_HOME and XDG_DATA_HOME else, if other programs set them.
if not defined UV_INSTALL_DIR set "UV_INSTALL_DIR=%USERPROFILE%\.local\bin"
call :look_for_uv
if defined UV goto find_python
echo.
echo Getting uv, the program that installs Python and everything else.
set "WHY=uv could not be installed: there may be no internet connection, or a proxy or virus scanner stopped it."
set "WAY=Install uv another way (winget install astral-sh.uv, or pip install uv), then run this again."
set "FETCH=[Net.ServicePointManager]::SecurityProtocol = 'Tls12'; irm https://astral.sh/uv/install.ps1 | iex"
powershell -NoProfile -ExecutionPolicy Bypass -Command "%FETCH%"
if %errorlevel% neq 0 goto failed
call :look_for_uv
if not defined UV goto failed

:find_python
rem A virtual environment that was made on another system, or whose Python has gone, is made anew.
set "PYTHON=.venv\Scripts\python.exe"
if not exist "%PYTHON%" goto make_environment
"%PYTHON%" -c "" >nul 2>nul
if %errorlevel% equ 0 goto find_gpu
:make_environment
echo.
echo Getting Python.
set "WHY=Python could not be installed into the folder .venv, for the reason above."
set "WAY=Close all that uses Side-Step, check the internet connection; an old uv is updated by: uv self update"
rem By its name: without one uv clears and fills what UV_PROJECT_ENVIRONMENT names.
"%UV%" venv --quiet --clear .venv
if %errorlevel% neq 0 goto failed

:find_gpu
set "GPU="
nvidia-smi >nul 2>nul
if %errorlevel% neq 0 goto no_gpu
for /f "delims=" %%G in ('nvidia-smi --query-gpu^=name^,driver_version --format^=csv^,noheader') do if not defined GPU set "GPU=%%G"
if not defined GPU goto no_gpu
echo.
echo NVIDIA GPU and its driver: %GPU%
goto install
:no_gpu
echo.
echo No NVIDIA GPU answers here: training will be very slow, unless torch has a build for the GPU that there is.
echo   If there is one from NVIDIA, install its driver, then run this again.

:install
rem A torch that is there is replaced, and fetched anew, only where one was asked for or it does not use the GPU.
set "USES_GPU=import sys, torch; sys.exit(not torch.cuda.is_available())"
set "AGAIN=--reinstall-package torch --reinstall-package torchaudio"
if not defined TORCH if defined UV_TORCH_BACKEND set "TORCH=%UV_TORCH_BACKEND%"
if defined TORCH goto choose_torch
if not defined GPU set "AGAIN="
if not defined GPU goto choose_torch
"%PYTHON%" -c "%USES_GPU%" >nul 2>nul
if %errorlevel% equ 0 set "AGAIN="
:choose_torch
if not defined TORCH set "TORCH=auto"
echo Installing torch (%TORCH%) and the rest: some gigabytes the first time.
set "WHY=Side-Step's list of packages could not be read, for the reason above."
set "WAY=Get a fresh copy of Side-Step; an old uv is updated by: uv self update"
set "LOCKED=.venv\locked.txt"
"%UV%" export --quiet --frozen --no-dev --no-emit-project --prune torch --prune torchaudio -o "%LOCKED%"
if %errorlevel% neq 0 goto failed
rem From another folder: in this one uv heeds the rule in pyproject.toml that keeps `uv run` from touching torch.
set "WHY=The packages could not be installed, for the reason above."
set "WAY=Check the internet connection and that 10 GB are free, close all that uses Side-Step, and run this again."
pushd "%TEMP%"
"%UV%" pip install --python "%HERE%%PYTHON%" --torch-backend %TORCH% %AGAIN% -r "%HERE%pyproject.toml" -c "%HERE%%LOCKED%"
if %errorlevel% neq 0 goto failed
popd

set "WHY=torch is installed but does not start, for the reason above."
set "WAY=If it names a DLL, install Microsoft's Visual C++ Redistributable (x64); then run this again."
echo.
"%PYTHON%" train.py --version
if %errorlevel% neq 0 goto failed
if not defined GPU goto verify
"%PYTHON%" -c "%USES_GPU%" >nul 2>nul
if %errorlevel% equ 0 goto verify
echo.
echo Note: torch cannot use the GPU. Its driver is probably too old: install a new one from NVIDIA's site, then
echo   run this again. Until then training runs on the CPU, very slowly.

:verify
echo.
"%PYTHON%" train.py doctor
if %errorlevel% equ 0 goto launcher
echo.
echo Note: training waits for what is called a problem above. The wizard fetches the models.
:launcher
set "WHY=Side-Step.bat could not be written."
set "WAY=Close what has it open, then run this again."
if exist "Side-Step.bat" del "Side-Step.bat"
call :write_launcher 2>nul
if not exist "Side-Step.bat" goto failed
echo.
echo Side-Step is installed. Start it with Side-Step.bat, by double-click or in a terminal.
if defined YES goto done
set "ANSWER="
set /p "ANSWER=Start it now? [Y/n] "
if not defined ANSWER set "ANSWER=y"
if /i "%ANSWER:~0,1%"=="n" goto done
call "Side-Step.bat"
:done
popd
exit /b 0

:look_for_uv
set "UV="
for %%I in (uv.exe) do set "UV=%%~$PATH:I"
set "LINKS=%LOCALAPPDATA%\Microsoft\WinGet\Links"
for %%D in ("%UV_INSTALL_DIR%" "%USERPROFILE%\.local\bin" "%USERPROFILE%\.cargo\bin" "%LINKS%") do (
  if not defined UV if exist "%%~D\uv.exe" set "UV=%%~D\uv.exe"
)
exit /b 0

:check_writing
echo check>"install-check.tmp"
exit /b 0

:write_launcher
rem The first line makes the file; what %% doubles stands there once.
set "LAUNCHER=Side-Step.bat"
echo @echo off>"%LAUNCHER%"
echo rem Starts Side-Step; made by install_windows.bat. Arguments go to train.py.>>"%LAUNCHER%"
echo setlocal>>"%LAUNCHER%"
echo set "SIDESTEP_START=.\Side-Step.bat">>"%LAUNCHER%"
echo if "%%~1"=="" pushd "%%~dp0">>"%LAUNCHER%"
echo if /i not "%%CD%%\"=="%%~dp0" set "SIDESTEP_START=%%~f0">>"%LAUNCHER%"
echo "%%~dp0.venv\Scripts\python.exe" "%%~dp0train.py" %%*>>"%LAUNCHER%"
echo set "CODE=%%errorlevel%%">>"%LAUNCHER%"
echo if "%%~1"=="" if not "%%CODE%%"=="0" pause>>"%LAUNCHER%"
echo exit /b %%CODE%%>>"%LAUNCHER%"
exit /b 0

:failed
echo.
echo Error: %WHY%
echo   %WAY%
if not defined YES pause
exit /b 1
