"use strict";
(() => {
  const report = JSON.parse(document.getElementById("report-data").textContent);
  const root = document.documentElement;
  const digits = (value, significant = 3) => {
    if (value === 0) return "0";
    const after = Math.max(0, significant - 1 - Math.floor(Math.log10(Math.abs(value))));
    return value.toLocaleString("en-US", { minimumFractionDigits: after, maximumFractionDigits: after });
  };
  const unit = (value, units) => {
    for (const [size, name] of units) if (value >= size * 0.9995) return `${digits(value / size)}\u00a0${name}`;
    const [size, name] = units[units.length - 1];
    return `${digits(value / size)}\u00a0${name}`;
  };
  const duration = (seconds) => unit(seconds, [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"], [1e-3, "ms"], [1e-6, "µs"]]);
  const speedText = (bits) => unit(bits, [[1e9, "Gbit/s"], [1e6, "Mbit/s"], [1e3, "kbit/s"]]).replace(/\.0+(?=\u00a0)/, "");

  // Language: both are in the page; <html lang> says which one shows. What a drawing says follows.
  const titles = Object.fromEntries(["en", "ja"].map((name) => [name, document.querySelector(`.kicker [lang=${name}]`).textContent]));
  const buttons = document.querySelectorAll("[data-language]");
  const speak = (language) => {
    root.lang = language;
    document.title = titles[language];
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.language === language));
    for (const drawn of document.querySelectorAll("svg [data-en]")) {
      drawn.setAttribute("aria-label", drawn.dataset[language]);
      drawn.querySelector("title").textContent = drawn.dataset[language];
    }
  };
  for (const button of buttons) button.addEventListener("click", () => speak(button.dataset.language));
  speak(root.lang);

  // Transfer: seconds = waiting + 8 bytes / speed, drawn over 56 kbit/s to 1 Gbit/s.
  const chart = document.querySelector("svg.transfer");
  if (chart) {
    const [slowest, fastest] = [56e3, 1e9];
    const { top, bottom, low, high } = Object.fromEntries(Object.entries(chart.dataset).map(([name, value]) => [name, Number(value)]));
    const range = document.getElementById("speed"), wait = document.getElementById("wait"), shown = document.getElementById("speed-shown");
    const down = (seconds) => {
      const share = (Math.log10(seconds) - Math.log10(low)) / (Math.log10(high) - Math.log10(low));
      return bottom - (bottom - top) * Math.min(1, Math.max(0, share));
    };
    const draw = () => {
      const first = Math.min(10000, Math.max(0, Number(wait.value) || 0)) / 1000;
      const share = Number(range.value) / 1000;
      const bits = slowest * (fastest / slowest) ** share;
      shown.textContent = speedText(bits);
      range.setAttribute("aria-valuetext", speedText(bits));
      const cursor = chart.querySelector(".cursor");
      cursor.setAttribute("x1", `${100 * share}%`);
      cursor.setAttribute("x2", `${100 * share}%`);
      for (const way of chart.querySelectorAll(".way")) {
        const bytes = Number(way.dataset.bytes);
        const lines = way.querySelectorAll("line");
        lines.forEach((line, place) => {
          const at = (i) => down(first + (8 * bytes) / (slowest * (fastest / slowest) ** (i / lines.length)));
          line.setAttribute("y1", at(place));
          line.setAttribute("y2", at(place + 1));
        });
      }
      for (const cell of document.querySelectorAll("[data-time]")) cell.textContent = duration(first + (8 * Number(cell.dataset.time)) / bits);
    };
    range.addEventListener("input", draw);
    wait.addEventListener("input", draw);
    draw();
  }

  // Memory: how many tasks fit, as experts beside one base and as full copies.
  const memory = document.getElementById("memory-size");
  if (memory && report.memory) {
    const lines = [...memory.closest(".body").querySelectorAll(".group .line")];
    const draw = () => {
      const bytes = Math.max(0, Number(memory.value) || 0) * 1e9;
      const { base, expert, undo } = report.memory;
      const counts = [Math.max(0, Math.floor((bytes - base - undo) / Math.max(expert, 1))), Math.floor(bytes / base)];
      const most = Math.max(...counts, 1);
      lines.forEach((line, place) => {
        line.querySelector(".value").textContent = counts[place].toLocaleString("en-US");
        line.querySelector(".bar").style.width = `max(2px, ${(100 * counts[place]) / most}%)`;
        const bar = line.querySelector("g");
        for (const language of ["en", "ja"]) {
          bar.dataset[language] = `${line.querySelector(`.what [lang=${language}]`).textContent}: ${counts[place].toLocaleString("en-US")}`;
        }
      });
    };
    memory.addEventListener("input", () => { draw(); speak(root.lang); });
    draw();
  }
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());

  // What the keyboard has reached says itself beside it, as a title does under the mouse.
  const tip = document.getElementById("tip");
  document.addEventListener("focusin", (event) => {
    const said = event.target.closest("svg [aria-label]");
    tip.hidden = !said;
    if (!said) return;
    tip.textContent = said.getAttribute("aria-label");
    const box = said.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 - tip.offsetWidth / 2), root.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${box.top + window.scrollY - tip.offsetHeight - 8}px`;
  });
  document.addEventListener("focusout", () => { tip.hidden = true; });

  const all = document.getElementById("all");
  all.href = `data:application/json;charset=utf-8,${encodeURIComponent(JSON.stringify(report, null, 2))}`;
})();
