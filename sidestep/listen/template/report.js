"use strict";
// Players: the versions of a prompt share one position, so that switching compares the same moment.
for (const prompt of document.querySelectorAll(".prompt")) {
  const versions = [...prompt.querySelectorAll(".version")];
  let position = 0;
  let current = null;
  const seconds = (audio) => (Number.isFinite(audio.duration) ? audio.duration : Number(prompt.dataset.seconds));
  const draw = () => {
    for (const version of versions) {
      const audio = version.querySelector("audio");
      const share = Math.min(1, position / seconds(audio));
      const sound = version.querySelector(".sound");
      sound.querySelector("i").style.left = `${share * 100}%`;
      sound.setAttribute("aria-valuenow", position.toFixed(1));
      version.classList.toggle("playing", version === current);
      version.querySelector("button").setAttribute("aria-pressed", String(version === current));
    }
  };
  const stop = () => {
    if (current) current.querySelector("audio").pause();
    current = null;
    draw();
  };
  const play = (version) => {
    for (const other of document.querySelectorAll("audio")) other.pause();
    document.dispatchEvent(new CustomEvent("another", { detail: prompt }));
    const audio = version.querySelector("audio");
    if (position >= seconds(audio) - 0.05) position = 0;
    audio.currentTime = position;
    current = version;
    draw();
    audio.play().catch(stop);
  };
  const seek = (version, to) => {
    position = Math.max(0, Math.min(seconds(version.querySelector("audio")), to));
    if (current) current.querySelector("audio").currentTime = position;
    draw();
  };
  document.addEventListener("another", (event) => { if (event.detail !== prompt) { current = null; draw(); } });
  for (const version of versions) {
    const audio = version.querySelector("audio");
    const sound = version.querySelector(".sound");
    audio.removeAttribute("controls");
    audio.hidden = true;
    version.querySelector("button").addEventListener("click", () => (version === current ? stop() : play(version)));
    audio.addEventListener("timeupdate", () => { if (version === current) { position = audio.currentTime; draw(); } });
    audio.addEventListener("ended", () => { if (version === current) { position = 0; stop(); } });
    const follow = (event) => {
      const box = sound.getBoundingClientRect();
      seek(version, ((event.clientX - box.left) / box.width) * seconds(audio));
    };
    sound.addEventListener("pointerdown", (event) => { sound.setPointerCapture(event.pointerId); follow(event); });
    sound.addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
    sound.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); seek(version, position + step); }
    });
  }
}
// Charts: a line under the pointer, and the numbers there.
for (const chart of document.querySelectorAll(".chart")) {
  const plot = chart.querySelector(".plot");
  const reading = chart.querySelector(".reading");
  const data = JSON.parse(chart.querySelector("script").textContent);
  const cursor = document.createElement("div");
  cursor.className = "cursor";
  cursor.hidden = true;
  plot.append(cursor);
  const idle = reading.textContent;
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const share = Math.max(0, Math.min(1, (event.clientX - box.left) / box.width));
    const step = data.first + share * (data.last - data.first);
    const words = data.series.map((series) => {
      let best = series.points[0];
      for (const point of series.points) if (Math.abs(point[0] - step) < Math.abs(best[0] - step)) best = point;
      return `${series.name} ${best[1].toPrecision(4)} at step ${best[0]}`;
    });
    cursor.hidden = false;
    cursor.style.left = `${share * 100}%`;
    reading.textContent = words.join(" · ");
  });
  plot.addEventListener("pointerleave", () => { cursor.hidden = true; reading.textContent = idle; });
}
