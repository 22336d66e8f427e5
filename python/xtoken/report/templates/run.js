const SVG = "http://www.w3.org/2000/svg";
const draw = (tag, attributes, text) => {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};
const letter = (run) => String.fromCharCode(65 + run);
const shown = (x) => {
  if (x === 0) return "0";
  const size = Math.abs(x);
  return size >= 1e5 || size < 1e-3 ? x.toExponential(1) : String(Number(x.toPrecision(4)));
};
// Round numbers, about `wanted` of them; steps are whole.
const ticks = (low, high, wanted, whole) => {
  const rough = Math.max((high - low) / wanted, whole ? 1 : Number.MIN_VALUE);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999 && (!whole || Number.isInteger(x)));
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-9) + 1e-12; at += 1) found.push(Number((at * step).toPrecision(12)));
  return found;
};
const mean = (line) => line.map(([step], at) => {
  const part = line.slice(Math.max(0, at + 1 - data.mean_of), at + 1);
  return [step, part.reduce((sum, [, value]) => sum + value, 0) / part.length];
});
const nearest = (line, step) => line.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best), line[0]);

const fromZero = byId("from-zero");
const charts = [...document.querySelectorAll(".chart")].map((box) => {
  const chart = data.charts[Number(box.dataset.chart)];
  return { box, chart, read: box.parentElement.querySelector(".read"), lines: chart.lines.map((line) => (chart.smooth ? mean(line) : line)) };
});
const said = ({ chart, lines }) => `${chart.title}. ` + lines.map((line, run) => (line.length
  ? `${letter(run)}, ${data.runs[run]}: ${shown(line[0][1])} at step ${line[0][0]} to ${shown(line.at(-1)[1])} at step ${line.at(-1)[0]}` : `${letter(run)}, ${data.runs[run]}: not logged`)).join("; ");

const paint = (one) => {
  const { box, chart, lines, read } = one;
  const width = Math.max(box.clientWidth, 200), height = 210;
  const edge = { left: 50, right: 26, top: 10, bottom: 34 };
  const steps = chart.lines.flatMap((line) => line.map(([step]) => step));
  const first = Math.min(...steps), last = Math.max(...steps, first + 1);
  const values = chart.lines.flatMap((line) => line.map(([, value]) => value));
  const low = fromZero.checked ? chart.low : Math.min(...values), high = fromZero.checked ? chart.high : Math.max(...values);
  const top = high === 1 && low === 0 ? 1 : high + ((high - low) || Math.abs(high) || 1) * 0.05;
  const x = (step) => edge.left + (step - first) / (last - first) * (width - edge.left - edge.right);
  const y = (value) => height - edge.bottom - (value - low) / (top - low || 1) * (height - edge.top - edge.bottom);
  const svg = draw("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": said(one) });
  for (const value of ticks(low, top, 4, false)) {
    svg.append(draw("line", { class: "grid", x1: edge.left, x2: width - edge.right, y1: y(value), y2: y(value) }),
      draw("text", { x: edge.left - 6, y: y(value) + 4, "text-anchor": "end" }, shown(value)));
  }
  for (const step of ticks(first, last, Math.max(2, width / 90), true)) {
    svg.append(draw("text", { x: x(step), y: height - edge.bottom + 16, "text-anchor": "middle" }, count(step)));
  }
  svg.append(draw("line", { class: "axis", x1: edge.left, x2: width - edge.right, y1: height - edge.bottom, y2: height - edge.bottom }),
    draw("text", { x: (edge.left + width - edge.right) / 2, y: height - 4, "text-anchor": "middle" }, "step"));
  const path = (line) => line.map(([step, value], at) => `${at ? "L" : "M"}${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("");
  lines.forEach((line, run) => {
    if (!line.length) return;
    if (chart.smooth) svg.append(draw("path", { class: `raw run-${run}`, d: path(chart.lines[run]) }));
    svg.append(draw("path", { class: `run-${run}`, d: path(line) }));
    if (!chart.smooth && line.length < 60) for (const [step, value] of line) svg.append(draw("circle", { cx: x(step), cy: y(value), r: 2.5, class: `run-${run}`, fill: "none" }));
  });
  // Letters at the ends of the lines, in their order, moved apart where these meet.
  const ends = lines.map((line, run) => (line.length ? { run, at: y(line.at(-1)[1]) + 4, x: x(line.at(-1)[0]) } : null)).filter((end) => end).sort((p, q) => p.at - q.at || p.run - q.run);
  for (let pass = 0; pass < 40; pass += 1) {
    for (let at = 1; at < ends.length; at += 1) {
      const near = 12 - (ends[at].at - ends[at - 1].at);
      if (near > 0) { ends[at - 1].at -= near / 2; ends[at].at += near / 2; }
    }
  }
  const over = ends.length ? Math.max(0, edge.top + 6 - ends[0].at) - Math.max(0, ends.at(-1).at - (height - edge.bottom + 4)) : 0;
  for (const end of ends) end.at += over;
  for (const end of ends) svg.append(draw("text", { class: "name", x: Math.min(end.x + 5, width - 12), y: end.at }, letter(end.run)));
  const cursor = draw("line", { class: "cursor", y1: edge.top, y2: height - edge.bottom, visibility: "hidden" });
  svg.append(cursor);
  const all = [...new Set(lines.flatMap((line) => line.map(([step]) => step)))].sort((a, b) => a - b);
  const tell = (step) => {
    one.step = step;
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    read.textContent = `step ${count(step)}: ` + lines.map((line, run) => {
      const point = line.length ? nearest(line, step) : null;
      return point === null ? null : `${letter(run)} ${shown(point[1])}${point[0] === step ? "" : ` (step ${count(point[0])})`}`;
    }).filter((text) => text !== null).join(", ");
  };
  const hide = () => { cursor.setAttribute("visibility", "hidden"); read.textContent = ""; };
  const closest = (step) => all.reduce((best, other) => (Math.abs(other - step) < Math.abs(best - step) ? other : best), all[0]);
  svg.addEventListener("pointermove", (event) => {
    const at = event.clientX - svg.getBoundingClientRect().left;
    tell(closest(first + (at - edge.left) / (width - edge.left - edge.right) * (last - first)));
  });
  svg.addEventListener("pointerleave", () => { if (document.activeElement !== svg) hide(); });
  svg.addEventListener("focus", () => tell(one.step ?? all.at(-1)));
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", (event) => {
    const at = all.indexOf(one.step ?? all.at(-1));
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    tell(all[Math.min(Math.max(to, 0), all.length - 1)]);
  });
  box.replaceChildren(svg);
};
fromZero.addEventListener("input", () => charts.forEach(paint));
let widths = charts.map(() => 0);
const paintAll = () => charts.forEach((one, at) => {
  if (one.box.clientWidth === widths[at]) return;
  widths[at] = one.box.clientWidth;
  paint(one);
});
paintAll();
new ResizeObserver(paintAll).observe(byId("main"));
