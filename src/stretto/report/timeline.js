"use strict";
(() => {
  const ROW = 20, CURVE = 44, HEAD = 26, AXIS = 24, LABEL = 150;
  const COLOURS = ["#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#7f8fa6"];
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer;
  const unpackSpans = packed => ({
    count: packed.count,
    start: new Float64Array(bytes(packed.start)),
    finish: new Float64Array(bytes(packed.finish)),
    ...Object.fromEntries(["lane", "phase", "step", "micro_batch", "stage", "rank"].map(
      name => [name, new Int32Array(bytes(packed[name]))])),
  });

  const traces = JSON.parse(document.getElementById("data").textContent).map(t => ({
    ...t,
    spans: unpackSpans(t.spans),
    requests: unpackSpans(t.requests),
    curves: Object.entries(t.curves).map(([name, c]) => ({
      name, times: new Float64Array(bytes(c.times)), values: new Float64Array(bytes(c.values)),
    })),
  }));

  const phases = [...new Set(traces.flatMap(t => t.phases))];
  const colour = phase => COLOURS[phases.indexOf(phase) % COLOURS.length];
  document.getElementById("legend").append(...phases.map(phase => {
    const item = document.createElement("span"), box = document.createElement("i");
    box.style.background = colour(phase);
    item.append(box, phase);
    return item;
  }));

  // The rows of the picture, top to bottom: for each trace a heading, its lanes, its requests (stacked), its curves.
  function stack(spans) {
    const order = Array.from({ length: spans.count }, (_, i) => i).sort((a, b) => spans.start[a] - spans.start[b]);
    const ends = [], level = new Int32Array(spans.count);
    for (const i of order) {
      let k = ends.findIndex(end => end <= spans.start[i]);
      if (k < 0) k = ends.length < 64 ? ends.push(0) - 1 : i % 64;
      ends[k] = spans.finish[i];
      level[i] = k;
    }
    return { levels: ends.length, level };
  }

  function rangeOf(column, value) {
    let low = 0, high = column.length;
    while (low < high) { const mid = (low + high) >> 1; if (column[mid] < value) low = mid + 1; else high = mid; }
    const first = low;
    high = column.length;
    while (low < high) { const mid = (low + high) >> 1; if (column[mid] <= value) low = mid + 1; else high = mid; }
    return [first, low];
  }

  const rows = [];
  let height = AXIS;
  const add = (row, size) => { rows.push({ ...row, y: height, size }); height += size; };
  for (const trace of traces) {
    add({ kind: "head", text: `${trace.source}: ${trace.makespan.toPrecision(4)} s` }, HEAD);
    trace.lanes.forEach((lane, id) => {
      const [first, last] = rangeOf(trace.spans.lane, id);
      if (last > first) add({ kind: "lane", trace, lane, first, last }, ROW);
    });
    if (trace.requests.count) {
      const { levels, level } = stack(trace.requests);
      add({ kind: "requests", trace, level, levels }, Math.max(ROW, levels * 7 + 6));
    }
    for (const curve of trace.curves) if (curve.times.length) add({ kind: "curve", trace, curve }, CURVE);
  }

  const end = Math.max(1e-9, ...traces.map(t => t.makespan)) * 1.01;
  const view = { from: 0, to: end };
  const canvas = document.getElementById("canvas"), tip = document.getElementById("tip");
  const context = canvas.getContext("2d");
  const width = () => canvas.clientWidth;
  const x = t => LABEL + (t - view.from) / (view.to - view.from) * (width() - LABEL);
  const time = px => view.from + (px - LABEL) / (width() - LABEL) * (view.to - view.from);

  function firstEndingAfter(finish, first, last, t) {
    while (first < last) { const mid = (first + last) >> 1; if (finish[mid] < t) first = mid + 1; else last = mid; }
    return first;
  }

  function bars(spans, first, last, top, size, phaseNames) {
    // Of bars that would fall into one pixel only the first is drawn.
    let drawnTo = -1;
    for (let i = firstEndingAfter(spans.finish, first, last, view.from); i < last && spans.start[i] <= view.to; i++) {
      const left = Math.max(LABEL, x(spans.start[i])), right = Math.max(x(spans.finish[i]), left + 0.6);
      if (right <= drawnTo) continue;
      context.fillStyle = colour(phaseNames[spans.phase[i]]);
      context.fillRect(left, top + 2, right - left, size - 4);
      drawnTo = Math.max(right, left + 1);
    }
  }

  function drawRequests(row) {
    const spans = row.trace.requests;
    for (let i = 0; i < spans.count; i++) {
      if (spans.finish[i] < view.from || spans.start[i] > view.to) continue;
      const left = Math.max(LABEL, x(spans.start[i])), right = Math.max(x(spans.finish[i]), left + 1);
      context.fillStyle = colour(row.trace.phases[spans.phase[i]]);
      context.fillRect(left, row.y + 3 + row.level[i] * 7, right - left, 5);
    }
  }

  function drawCurve(row) {
    const { times, values } = row.curve, peak = Math.max(1e-12, ...[values.reduce((a, b) => Math.max(a, b), 0)]);
    const y = v => row.y + row.size - 4 - v / peak * (row.size - 10);
    context.strokeStyle = css("--dim");
    context.beginPath();
    let i = Math.max(0, firstEndingAfter(times, 0, times.length, view.from) - 1), last = -1;
    context.moveTo(Math.max(LABEL, x(times[i])), y(values[i]));
    for (; i < times.length && times[i] <= view.to; i++) {
      const px = Math.max(LABEL, x(times[i]));
      if (px - last < 0.5) continue;
      context.lineTo(px, y(values[Math.max(0, i - 1)]));
      context.lineTo(px, y(values[i]));
      last = px;
    }
    context.lineTo(x(Math.min(view.to, row.trace.makespan)), y(values[Math.max(0, i - 1)]));
    context.stroke();
  }

  function drawAxis() {
    context.fillStyle = context.strokeStyle = css("--dim");
    const span = view.to - view.from, raw = span / 8, base = 10 ** Math.floor(Math.log10(raw));
    const tick = [1, 2, 5, 10].map(k => k * base).find(k => k >= raw);
    const digits = Math.max(0, -Math.floor(Math.log10(tick)));
    const first = Math.ceil(view.from / tick), last = Math.min(Math.floor(view.to / tick), first + 20);
    for (let number = first; number <= last; number++) {
      const t = number * tick;
      context.globalAlpha = 1;
      context.fillText(`${t.toFixed(Math.min(digits, 20))} s`, x(t) + 3, 15);
      context.globalAlpha = 0.25;
      context.fillRect(x(t), 0, 1, height);
    }
    context.globalAlpha = 1;
  }

  function label(text, y, bold) {
    context.font = `${bold ? "bold " : ""}12px system-ui, sans-serif`;
    context.fillStyle = css("--ink");
    const fits = text.length > 22 && !bold ? text.slice(0, 21) + "…" : text;
    context.fillText(fits, 6, y);
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    canvas.style.height = `${height + 6}px`;
    canvas.width = width() * scale;
    canvas.height = (height + 6) * scale;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width(), height + 6);
    context.font = "11px system-ui, sans-serif";
    drawAxis();
    for (const row of rows) {
      if (row.kind === "head") {
        context.fillStyle = css("--band");
        context.fillRect(0, row.y, width(), row.size);
        label(row.text, row.y + 17, true);
        continue;
      }
      if (row.kind === "lane") {
        label(row.lane, row.y + 14);
        bars(row.trace.spans, row.first, row.last, row.y, row.size, row.trace.phases);
      } else if (row.kind === "requests") {
        label("requests", row.y + 14);
        drawRequests(row);
      } else {
        label(row.curve.name, row.y + 14);
        drawCurve(row);
      }
    }
  }

  function describe(trace, spans, i) {
    const key = ["step", "micro_batch", "stage", "rank"].filter(name => spans[name][i] >= 0)
      .map(name => `${name} ${spans[name][i]}`).join(", ");
    const seconds = spans.finish[i] - spans.start[i];
    return `${trace.phases[spans.phase[i]]}${key ? ` (${key})` : ""}\n` +
      `${spans.start[i].toPrecision(6)} s + ${(seconds * 1e3).toPrecision(4)} ms`;
  }

  function under(px, py) {
    const row = rows.find(r => py >= r.y && py < r.y + r.size), t = time(px);
    if (!row || px < LABEL) return null;
    if (row.kind === "lane") {
      const spans = row.trace.spans, i = firstEndingAfter(spans.finish, row.first, row.last, t);
      return i < row.last && spans.start[i] <= t ? describe(row.trace, spans, i) : null;
    }
    if (row.kind === "requests") {
      const spans = row.trace.requests, wanted = Math.floor((py - row.y - 3) / 7);
      for (let i = 0; i < spans.count; i++)
        if (row.level[i] === wanted && spans.start[i] <= t && t <= spans.finish[i]) return describe(row.trace, spans, i);
    }
    return null;
  }

  let dragged = null;
  canvas.addEventListener("pointerdown", e => { dragged = e.clientX; canvas.setPointerCapture(e.pointerId); });
  canvas.addEventListener("pointerup", () => { dragged = null; });
  canvas.addEventListener("pointermove", e => {
    const box = canvas.getBoundingClientRect(), px = e.clientX - box.left, py = e.clientY - box.top;
    if (dragged !== null) {
      const shift = (dragged - e.clientX) / (width() - LABEL) * (view.to - view.from);
      view.from += shift; view.to += shift; dragged = e.clientX;
      draw();
      return;
    }
    const text = under(px, py);
    tip.style.display = text ? "block" : "none";
    if (text) { tip.textContent = text; tip.style.left = `${Math.min(px + 12, width() - 220)}px`; tip.style.top = `${py + 14}px`; }
  });
  canvas.addEventListener("wheel", e => {
    e.preventDefault();
    const at = time(e.clientX - canvas.getBoundingClientRect().left), wanted = Math.exp(Math.sign(e.deltaY) * 0.25);
    const span = view.to - view.from, least = Math.max(end, Math.abs(at)) * 1e-9, most = end * 100;
    const factor = Math.min(most, Math.max(least, span * wanted)) / span;
    view.from = at + (view.from - at) * factor;
    view.to = at + (view.to - at) * factor;
    draw();
  }, { passive: false });
  canvas.addEventListener("dblclick", () => { view.from = 0; view.to = end; draw(); });
  window.addEventListener("resize", draw);
  draw();
  document.documentElement.dataset.drawn = String(traces.length);
})();
