"use strict";
(() => {
  const charts = [...document.querySelectorAll(".plot")].filter((plot) => plot.querySelector("script")).map((plot) => ({
    canvas: plot.querySelector(".canvas"),
    cursor: plot.querySelector(".cursor"),
    tip: plot.querySelector(".tip"),
    legend: [...plot.parentElement.querySelectorAll(".legend b")],
    data: JSON.parse(plot.querySelector("script").textContent),
  }));
  for (const chart of charts) chart.last = chart.legend.map((value) => value.textContent);

  // The point of a series that is nearest to x.
  const nearest = (xs, x) => {
    let low = 0, high = xs.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (xs[middle] <= x) low = middle; else high = middle;
    }
    return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
  };
  const place = (chart, x) => (x - chart.data.x[0]) / (chart.data.x[1] - chart.data.x[0]);

  const row = (tip, label, value, color) => {
    const line = document.createElement("div");
    if (color) line.className = "s" + color;
    const name = document.createElement("span"), number = document.createElement("b");
    name.textContent = label;
    number.textContent = value;
    line.append(name, number);
    tip.append(line);
  };

  const show = (chart, x, withTip) => {
    const at = place(chart, x);
    if (at < -0.001 || at > 1.001) return hide(chart);
    chart.cursor.hidden = false;
    chart.cursor.style.left = 100 * at + "%";
    chart.tip.hidden = !withTip;
    if (!withTip) return;
    chart.tip.style.left = at <= 0.5 ? 100 * at + "%" : "";
    chart.tip.style.right = at > 0.5 ? 100 * (1 - at) + "%" : "";
  };
  const hide = (chart) => {
    chart.cursor.hidden = chart.tip.hidden = true;
    chart.legend.forEach((value, index) => { value.textContent = chart.last[index]; });
  };

  const showBin = (chart, x) => {
    const bin = chart.data.bins.find(([left, right]) => x >= left && x < right);
    if (!bin) return hide(chart);
    chart.tip.replaceChildren();
    row(chart.tip, bin[2], bin[3]);
    show(chart, (bin[0] + bin[1]) / 2, true);
  };

  // Every chart over steps shows the same step, the one under the pointer its values beside it.
  const showStep = (source, x) => {
    const all = source.data.series.flatMap((series) => series.x);
    const step = all.reduce((best, each) => (Math.abs(each - x) < Math.abs(best - x) ? each : best), all[0]);
    source.step = step;
    for (const chart of charts) {
      if (!chart.data.series) continue;
      chart.tip.replaceChildren();
      row(chart.tip, chart.data.label, step.toLocaleString("en"));
      chart.data.series.forEach((series, index) => {
        const found = nearest(series.x, step);
        chart.legend[index].textContent = series.text[found];
        row(chart.tip, series.label + (series.x[found] === step ? "" : " (" + series.x[found] + ")"),
          series.text[found], series.color);
      });
      show(chart, step, chart === source);
    }
  };
  const at = (chart, x) => (chart.data.bins ? showBin(chart, x) : showStep(chart, x));

  for (const chart of charts) {
    chart.canvas.addEventListener("pointermove", (event) => {
      const box = chart.canvas.getBoundingClientRect();
      const [low, high] = chart.data.x;
      at(chart, low + ((event.clientX - box.left) / box.width) * (high - low));
    });
    for (const name of ["pointerleave", "blur"]) chart.canvas.addEventListener(name, () => charts.forEach(hide));
    chart.canvas.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || !chart.data.series) return;
      event.preventDefault();
      const xs = chart.data.series[0].x;
      const next = nearest(xs, chart.step ?? xs[0]) + (chart.step === undefined ? 0 : move);
      showStep(chart, xs[Math.min(xs.length - 1, Math.max(0, next))]);
    });
  }

  for (const button of document.querySelectorAll(".copy")) {
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(button.previousElementSibling.textContent);
      button.textContent = "copied";
      setTimeout(() => { button.textContent = "copy"; }, 1500);
    });
  }
})();
