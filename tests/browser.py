"""Headless Chromium for the tests of the report's page: it runs a probe inside the page and tells what the probe found."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DARK = "--blink-settings=preferredColorScheme=0"

PROBE = """
(() => {
  const found = {};
  const visible = (node) => {
    const element = node.nodeType === 3 ? node.parentElement : node;
    return element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
  };
  const texts = () => {
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const list = [];
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      if (!node.textContent.trim() || node.parentElement.closest("script, style, title, .skip") || !visible(node)) continue;
      const range = document.createRange();
      range.selectNodeContents(node);
      // A line's box is taller than its letters; what a scrolling table hides is neither cut nor in the way.
      const frame = node.parentElement.closest(".scroll")?.getBoundingClientRect();
      const rects = [...range.getClientRects()]
        .map(({ left, right, top, bottom }) => ({ left, right, top: top + 0.2 * (bottom - top), bottom: bottom - 0.2 * (bottom - top) }))
        .map((box) => !frame ? box : {
          left: Math.max(box.left, frame.left), right: Math.min(box.right, frame.right),
          top: Math.max(box.top, frame.top), bottom: Math.min(box.bottom, frame.bottom),
        })
        .filter((box) => box.right - box.left > 1 && box.bottom - box.top > 1);
      list.push({ node, rects, text: node.textContent.trim() });
    }
    return list;
  };
  const overlapping = (list) => {
    const boxes = list.flatMap((one) => one.rects.map((rect) => ({ rect, one })));
    const bad = [];
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      if (a.one === b.one) continue;
      const wide = Math.min(a.rect.right, b.rect.right) - Math.max(a.rect.left, b.rect.left);
      const high = Math.min(a.rect.bottom, b.rect.bottom) - Math.max(a.rect.top, b.rect.top);
      if (wide > 1 && high > 1) bad.push(`${a.one.text.slice(0, 40)} | ${b.one.text.slice(0, 40)}`);
    }
    return bad;
  };
  const cut = (list) => {
    const width = document.documentElement.clientWidth;
    const bad = [];
    for (const one of list) for (const rect of one.rects) {
      const scroll = one.node.parentElement.closest(".scroll");
      const out = rect.left < -0.5 || rect.right > width + 0.5;
      if (!scroll && out) bad.push(`${one.text.slice(0, 40)}: ${rect.left} to ${rect.right} of ${width}`);
    }
    for (const element of document.body.querySelectorAll("*")) {
      const style = getComputedStyle(element);
      if (element.closest(".scroll, svg, input") || style.overflowX === "visible" || !visible(element)) continue;
      if (element.scrollWidth > element.clientWidth + 1) bad.push(`${element.tagName} hides ${element.scrollWidth - element.clientWidth}`);
    }
    if (document.documentElement.scrollWidth > width) bad.push(`the page scrolls to ${document.documentElement.scrollWidth} of ${width}`);
    return bad;
  };
  const light = (colour) => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d");
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const linear = (c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(linear);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const faint = (list) => {
    const paper = light(getComputedStyle(document.body).backgroundColor);
    const bad = [];
    for (const one of list) {
      const style = getComputedStyle(one.node.parentElement);
      const ink = light(one.node.parentElement.closest("svg") ? style.fill : style.color);
      const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
      if (contrast < 4.5 && !one.node.parentElement.closest("button")) bad.push(`${one.text.slice(0, 40)}: ${contrast.toFixed(2)}`);
    }
    return bad;
  };
  for (const details of document.querySelectorAll("details")) details.open = OPEN;
  for (const language of ["en", "ja"]) {
    const button = document.querySelector(`[data-language=${language}]`);
    if (button) button.click();
    const list = texts();
    found[language] = {
      lang: document.documentElement.lang,
      title: document.title,
      overlapping: overlapping(list),
      cut: cut(list),
      faint: faint(list),
      verdict: document.querySelector("h1").innerText,
      shown: list.length,
      other: list.filter((one) => one.node.parentElement.closest(`span[lang=${language === "en" ? "ja" : "en"}]`)).length,
    };
  }
  found.paper = light(getComputedStyle(document.body).backgroundColor);
  const drawn = ["svg", "rect", "line"].map((shape) => `svg:not(.symbol) ${shape}`).join();
  const parts = [...document.querySelectorAll("section")];
  found.charts = Object.fromEntries(parts.map((part) => [part.id, part.querySelectorAll(drawn).length]));
  const marks = [...document.querySelectorAll("svg [tabindex]")].filter(visible);
  found.marks = marks.length;
  const said = (mark) => mark.getAttribute("aria-label");
  found.mute = marks.filter((mark) => !said(mark) || mark.querySelector("title").textContent !== said(mark)).length;
  const reached = (mark) => {
    mark.focus();
    return document.activeElement === mark && !document.getElementById("tip").hidden;
  };
  found.unreachable = marks.filter((mark) => !reached(mark)).length;
  document.activeElement.blur();
  const speed = document.getElementById("speed"), wait = document.getElementById("wait"), memory = document.getElementById("memory-size");
  const set = (input, value) => { input.value = value; input.dispatchEvent(new Event("input")); };
  found.times = [...document.querySelectorAll("[data-time]")].map((cell) => cell.textContent);
  if (speed) {
    set(speed, 0);
    set(wait, 500);
    found.slow = [...document.querySelectorAll("[data-time]")].map((cell) => [Number(cell.dataset.time), cell.textContent]);
  }
  if (memory) {
    set(memory, 4);
    found.fit = [...document.querySelectorAll("#memory .group .value")].map((cell) => cell.textContent);
  }
  found.resources = performance.getEntriesByType("resource").map((entry) => entry.name);
  const out = document.createElement("pre");
  out.id = "probe";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
"""


def chromium() -> str:
    """The browser's command; the test is skipped where there is none."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium is installed: `make chromium` sets it up where it can")


def run(page: Path, profile: Path, *flags: str, width: int = 1280) -> str:
    """The page's DOM after its scripts have run."""
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}"]
    command += [f"--window-size={width},1000", "--virtual-time-budget=2000", *flags]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr[-2000:]
    return done.stdout


def probed(page: Path, profile: Path, *flags: str, width: int = 1280, unfold: bool = False, printed: bool = False) -> Any:
    """What the probe finds in the page at a width; `unfold` opens the tables, `printed` takes the rules of print."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)  # it would not let the probe run
    if printed:
        text = text.replace("@media print", "@media all").replace("@page", "@supports not (display: block)")
    text = text.replace("</body>", f"<script>{PROBE.replace('OPEN', 'true' if unfold else 'false')}</script></body>")
    copy = profile.parent / f"{profile.name}.html"
    copy.write_text(text, encoding="utf-8")
    found = re.search(r'<pre id="probe">(.*?)</pre>', run(copy, profile, *flags, width=width), re.DOTALL)
    assert found, "the probe did not finish"
    return json.loads(html.unescape(found[1]))
