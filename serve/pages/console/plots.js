// Line plots of the last ten minutes as SVG: one or two series, newest to the right. The caption says the newest values in words.

const WIDTH = 300, HEIGHT = 100, SVG = "http://www.w3.org/2000/svg";

export function plot(title, series, unit) {
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "plot");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const base = document.createElementNS(SVG, "line");
  for (const [name, value] of Object.entries({ x1: 0, x2: WIDTH, y1: HEIGHT - 1, y2: HEIGHT - 1 })) base.setAttribute(name, value);
  svg.append(base);
  const paths = series.map((_, index) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", index ? "second" : "first");
    svg.append(path);
    return path;
  });
  figure.append(caption, svg);

  function show(history) {
    const lines = series.map(({ name }) => history.series[name] ?? []);
    const known = lines.flat().filter((one) => one !== null);
    const top = Math.max(...known, 0) || 1;
    lines.forEach((line, index) => paths[index].setAttribute("d", outline(line, top)));
    const newest = lines.map((line) => line.at(-1) ?? null);
    caption.replaceChildren(
      title,
      ...series.map(({ label }, index) => legend(label, newest[index], unit, index)),
      `to ${shown(top)} ${unit}`,
    );
    svg.setAttribute("aria-label", `${title}: ` + series.map(({ label }, i) => `${label} ${shown(newest[i])} ${unit}`).join(", "));
  }
  return { figure, show };
}

function outline(line, top) {
  // The newest number stands at the right edge; a gap where there is none.
  const step = WIDTH / 119;
  let path = "", pen = "M";
  line.forEach((value, index) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const x = WIDTH - (line.length - 1 - index) * step, y = HEIGHT - 2 - (value / top) * (HEIGHT - 6);
    path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
  });
  return path;
}

function legend(label, value, unit, index) {
  const span = document.createElement("span"), mark = document.createElement("i"), bold = document.createElement("b");
  mark.className = index ? "second" : "first";
  bold.textContent = shown(value);
  span.append(mark, `${label} `, bold);
  return span;
}

export function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
}
