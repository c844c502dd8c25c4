// Draws the charts, puts the pictures in their places, and runs the explorer of the codebook.
"use strict";

const read = id => JSON.parse(document.getElementById(id).textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const count = value => value.toLocaleString("en-US");
const number = value => {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return value.toLocaleString("en-US", { maximumSignificantDigits: Number.isInteger(value) ? 7 : 4 });
};

// ---- pictures

const pictures = read("pictures");

function fill(image, name) {
  image.src = `data:image/jpeg;base64,${pictures[name].jpeg}`;
  image.alt = pictures[name].alt;
}

for (const image of document.querySelectorAll("img[data-picture]")) fill(image, image.dataset.picture);

// ---- charts

const HEIGHT = 250;
const drawn = []; // {plot, chart} of every chart on the page

const style = chart => chart.series.map((series, at) => {
  const alike = chart.series.slice(0, at).filter(other => other.dash === series.dash).length; // a dashed curve has its solid twin's colour
  const stroke = () => colour(`curve${alike % 7 + 1}`);
  const common = { label: series.label, stroke, value: (_, value) => number(value) };
  if (chart.kind === "bars") {
    const paths = uPlot.paths.bars({ size: [1, Infinity], align: 1, gap: 1 });
    return { ...common, width: 0, fill: stroke, paths, points: { show: false } };
  }
  const dash = series.dash ? [6, 5] : undefined;
  const few = chart.xs.length <= 40;
  return { ...common, width: 1.7, dash, points: { show: few, size: 5, fill: stroke } };
});

const edge = { class: "edge", width: 0, points: { show: false } }; // of a band; behind the curves, so in front of them in order

function bands(chart) {
  return chart.series.filter(series => series.band).map((series, at) => {
    const stroke = style(chart)[chart.series.indexOf(series)].stroke;
    return { series: [2 * at + 2, 2 * at + 1], fill: () => `${stroke()}2b` };
  });
}

const where = chart => (_, x, __, at) => {
  if (x == null || at == null) return "–";
  if (chart.kind !== "bars") return count(x);
  if (at === chart.xs.length - 1) return `${count(x)} or more`;
  return chart.step === 1 ? count(x) : `${count(Math.max(x, 0))} to ${count(x + chart.step - 1)}`;
};

function scales(chart) {
  if (chart.kind === "bars") {
    const end = chart.xs[chart.xs.length - 1] + chart.step;
    const top = (chart.mark == null ? 1.06 : 1.2) * Math.max(1, ...chart.series[0].values); // room for the mark's words
    return { x: { time: false, range: (_, low, high) => [low, high === chart.xs.at(-1) ? end : high] }, y: { range: [0, top] } };
  }
  const y = chart.log ? { distr: 3, range: (_, low, high) => uPlot.rangeLog(low, high, 10, false) } : {};
  return { x: { time: false }, y };
}

function axes(chart) {
  const look = { stroke: () => colour("quiet"), grid: { stroke: () => colour("grid"), width: 1 }, ticks: { stroke: () => colour("line"), width: 1 }, font: "12.5px system-ui, sans-serif", labelFont: "12.5px system-ui, sans-serif", labelSize: 20 };
  const values = (_, ticks) => ticks.map(tick => tick == null ? "" : number(tick));
  const wide = (plot, ticks) => 23 + 7 * Math.max(3, ...(ticks ?? []).map(tick => tick.length));
  return [{ ...look, label: chart.x, values, size: 32 }, { ...look, label: chart.y, values, size: wide }];
}

function mark(chart) { // a line after the last value that is read
  return plot => {
    const { ctx, bbox } = plot;
    const at = plot.valToPos(chart.mark + 1, "x", true);
    const unit = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour("curve6");
    ctx.lineWidth = 2 * unit;
    ctx.beginPath();
    ctx.moveTo(at, bbox.top);
    ctx.lineTo(at, bbox.top + bbox.height);
    ctx.stroke();
    ctx.font = `${12.5 * unit}px system-ui, sans-serif`;
    const right = at > bbox.left + 0.7 * bbox.width;
    ctx.textAlign = right ? "right" : "left";
    ctx.fillText(`cut after ${count(chart.mark)}`, at + (right ? -6 : 6) * unit, bbox.top + 14 * unit);
    ctx.restore();
  };
}

function described(chart) { // for screen readers
  const parts = chart.series.map(series => {
    const values = series.values.filter(value => value != null);
    const ends = `from ${number(values[0])} to ${number(values.at(-1))}`;
    const range = `lowest ${number(Math.min(...values))}, highest ${number(Math.max(...values))}`;
    return `${series.label}: ${chart.kind === "bars" ? range : `${ends}, ${range}`}`;
  });
  return `Chart, ${chart.y || chart.title} by ${chart.x}. ${parts.join("; ")}. Arrow keys read the values.`;
}

const values = (plot, at) => plot.series.map((series, n) => series.class === "edge" ? "" : `${series.label} ${n ? number(plot.data[n][at]) : count(plot.data[0][at])}`).filter(Boolean).join(", ");

function rest(plot) { // the legend shows the last values while the pointer is elsewhere
  plot.setLegend({ idx: plot.data[0].length - 1 });
}

function move(plot, event) {
  const { min, max } = plot.scales.x;
  const xs = plot.data[0];
  const first = xs.findIndex(x => x >= min);
  const last = xs.findLastIndex(x => x <= max);
  const at = plot.cursor.idx ?? last;
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: first, End: last }[event.key];
  if (event.key === "Escape") plot.setData(plot.data, true);
  else if (to === undefined) return;
  else {
    const next = Math.min(Math.max(to, first), last);
    plot.setCursor({ left: plot.valToPos(xs[next], "x"), top: plot.over.clientHeight / 2 });
    document.getElementById("spoken").textContent = values(plot, next);
  }
  event.preventDefault();
}

function draw(figure) {
  const place = figure.querySelector(".plot");
  const chart = JSON.parse(figure.querySelector("script").textContent);
  const edges = chart.series.flatMap(series => series.band ?? []);
  const options = {
    width: Math.max(place.clientWidth, 240),
    height: HEIGHT,
    scales: scales(chart),
    axes: axes(chart),
    series: [{ label: chart.x, value: where(chart) }, ...edges.map(() => ({ ...edge })), ...style(chart)],
    bands: bands(chart),
    cursor: { y: false, drag: { x: true, y: false }, sync: chart.x === "step" ? { key: "step" } : undefined },
    legend: { markers: { stroke: (plot, at) => plot.series[at].stroke?.(plot, at), dash: (plot, at) => plot.series[at].dash ? "dotted" : "solid" } },
    hooks: { ready: [rest], draw: chart.mark == null ? [] : [mark(chart)] },
  };
  const plot = new uPlot(options, [chart.xs, ...edges, ...chart.series.map(series => series.values)], place);
  place.setAttribute("aria-label", described(chart));
  place.addEventListener("keydown", event => move(plot, event));
  plot.over.addEventListener("mouseleave", () => drawn.forEach(rest));
  drawn.push(plot);
  new ResizeObserver(() => {
    const width = Math.max(place.clientWidth, 240);
    if (width !== plot.width) plot.setSize({ width, height: HEIGHT });
  }).observe(place);
}

for (const figure of document.querySelectorAll("figure.chart")) {
  const folded = figure.closest("details");
  if (folded && !folded.open) folded.addEventListener("toggle", () => draw(figure), { once: true });
  else draw(figure);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(plot => plot.redraw(false)));

// ---- the codebook

const SHOWN = 40; // codewords at once

function explorer() {
  const { codewords, captions, totals } = read("codebook");
  const [filter, sort, list, more] = ["filter", "sort", "codewords", "more"].map(id => document.getElementById(id));
  const template = document.getElementById("codeword").content;
  const agreement = code => code.pairs ? code.agreeing / code.pairs : 0;
  const use = code => code.images / totals.images + code.captions / totals.captions;
  const orders = {
    shared: (a, b) => Math.min(b.images, b.captions) - Math.min(a.images, a.captions) || use(b) - use(a),
    use: (a, b) => use(b) - use(a),
    agreement: (a, b) => agreement(b) - agreement(a) || b.pairs - a.pairs,
    code: (a, b) => a.code - b.code,
  };
  const split = text => text.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  for (const code of codewords) {
    const texts = code.texts.map(text => captions[text]);
    code.found = [...new Set([String(code.code), ...code.words.map(([word]) => word.toLowerCase()), ...texts.flatMap(split)])];
  }

  const share = (part, whole) => `${count(part)} (${(100 * part / whole).toFixed(1)} %)`;
  function card(code) {
    const item = template.cloneNode(true).firstElementChild;
    const put = (name, text) => { item.querySelector(name).textContent = text; };
    put("h3", `Codeword ${code.code}`);
    put(".of-images", share(code.images, totals.images));
    put(".of-captions", share(code.captions, totals.captions));
    put(".agreement", `${code.agreeing} of ${count(code.pairs)} pairs`);
    for (const name of code.pictures) {
      if (!pictures[name]) continue;
      const image = document.createElement("img");
      fill(image, name);
      image.title = image.alt;
      item.querySelector(".pictures").append(image);
    }
    if (!code.images) put(".pictures", "No picture uses it.");
    for (const [word, part] of code.words) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${word} ` });
      button.append(Object.assign(document.createElement("small"), { textContent: `${Math.round(100 * part)} %` }));
      button.addEventListener("click", () => { filter.value = word; show(); });
      item.querySelector(".words").append(button);
    }
    for (const text of code.texts) {
      item.querySelector(".captions").append(Object.assign(document.createElement("li"), { textContent: `“${captions[text]}”` }));
    }
    if (!code.captions) put(".captions", "No caption uses it.");
    return item;
  }

  let matching = [];
  function extend() {
    const from = list.children.length;
    list.append(...matching.slice(from, from + SHOWN).map(card));
    more.hidden = list.children.length >= matching.length;
  }
  function show() {
    const words = split(filter.value);
    const spaced = word => /^[\x00-\u024f]+$/.test(word); // other scripts may have no spaces between words
    const fits = (known, word) => spaced(word) ? known.startsWith(word) : known.includes(word);
    matching = codewords.filter(code => words.every(word => code.found.some(known => fits(known, word))));
    matching.sort(orders[sort.value]);
    list.replaceChildren();
    extend();
    document.getElementById("matches").textContent = `${count(matching.length)} of ${count(codewords.length)} codewords`;
  }
  filter.addEventListener("input", show);
  sort.addEventListener("change", show);
  more.addEventListener("click", extend);
  document.getElementById("explorer").addEventListener("submit", event => event.preventDefault());
  show();
}

if (document.getElementById("explorer")) explorer();
