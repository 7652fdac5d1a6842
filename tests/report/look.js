"use strict";
// What test_pages.py asks of every copy of a page: script errors, what is too wide, axis labels, figures and their values.
const scrolls = (element) => element.closest(".scroll, pre, svg, script, style") !== null;
const inPlot = ".canvas, .plot, .x-axis, .y-axis";
const named = (element) => `${element.tagName}.${element.className}: ${element.textContent.slice(0, 40)}`;

function tooWide(view) {
  const wide = [];
  for (const element of view.document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect(), style = view.getComputedStyle(element);
    if (!box.width || scrolls(element.parentElement)) continue;
    if (box.right > view.innerWidth + 0.5 || box.left < -0.5) {
      wide.push(`${named(element)} (${Math.round(box.left)} to ${Math.round(box.right)})`);
    }
    if (scrolls(element) || style.display === "inline" || style.overflow !== "visible" || element.matches(inPlot)) continue;
    // Text beyond its own box, though not beyond the screen.
    if (element.clientWidth && element.scrollWidth > element.clientWidth + 1) {
      wide.push(`${named(element)} (${element.scrollWidth} in ${element.clientWidth})`);
    }
  }
  return wide;
}

function clashes(view) {
  const found = [];
  for (const axis of view.document.querySelectorAll(".x-axis, .y-axis")) {
    const labels = [...axis.children].map((label) => label.getBoundingClientRect());
    const figure = axis.closest("figure").getBoundingClientRect();
    labels.forEach((one, index) => {
      if (one.left < figure.left || one.right > figure.right) found.push("a label leaves its figure: " + axis.textContent);
      for (const other of labels.slice(index + 1)) {
        const beside = one.right <= other.left || other.right <= one.left;
        if (!beside && one.top < other.bottom && other.top < one.bottom) found.push("labels overlap: " + axis.textContent);
      }
    });
  }
  return found;
}

function figures(view, wide) {
  const found = {};
  for (const figure of view.document.querySelectorAll("figure")) {
    const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip"), canvas = figure.querySelector(".canvas");
    if (!svg) continue;
    const box = svg.getBoundingClientRect();
    const drawn = [...figure.querySelectorAll("path:not(.grid)")].filter((path) => path.getTotalLength() > 0);
    const item = { width: box.width, height: box.height, paths: drawn.length, tip: "" };
    for (const share of tip ? [0.02, 0.98, 0.5] : []) {
      const clientX = box.left + share * box.width;
      canvas.dispatchEvent(new view.PointerEvent("pointermove", { clientX, clientY: box.top + 5, bubbles: true }));
      const shown = tip.getBoundingClientRect();
      item.tip = tip.hidden ? "" : tip.textContent;
      if (shown.left < 0 || shown.right > view.innerWidth) wide.push("values under the pointer: " + item.tip);
    }
    canvas.dispatchEvent(new view.PointerEvent("pointerleave"));
    found[figure.id.replace("chart-", "")] = item;
  }
  return found;
}

function look(view) {
  for (const details of view.document.querySelectorAll("details")) details.open = true;
  const wide = tooWide(view);
  const drawn = figures(view, wide);
  const scroll = view.document.documentElement.scrollWidth - view.innerWidth;
  return { problems: view.problems, wide, scroll, clashes: clashes(view), figures: drawn };
}

addEventListener("load", () => {
  const frames = [...document.querySelectorAll("iframe")];
  document.querySelector("#found").textContent = JSON.stringify(frames.map((frame) => look(frame.contentWindow)));
});
