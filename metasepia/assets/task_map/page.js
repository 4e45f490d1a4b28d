"use strict";
// The map of tasks: points on a canvas with zoom, hover, pins, filters and keys. Reads the JSON in #data and nothing else.
// What a point is called only ever becomes a text node, never markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { kinds, spaces, points } = data;
  const $ = (id) => document.getElementById(id);
  const canvas = $("map"), context = canvas.getContext("2d");
  const RADIUS = 5, REACH = 14, LISTED = 200, MOST_PINS = 8, LABELS = 60;

  const state = { space: 0, view: 0, words: [], kinds: new Set(kinds.keys()), at: -1, pins: [] };
  const look = { scale: 1, x: 0, y: 0 }; // of the picture: x, y is what stands in the middle
  const size = { width: 1, height: 1, ratio: 1 };
  const searched = points.name.map((name, i) => (name + "\n" + points.source[i].join("\n")).toLowerCase());
  let shown = []; // indices, in order
  let isShown = new Uint8Array(points.name.length);
  let colours = {};
  const row = new Int32Array(points.name.length); // of a point in its space's views
  for (const space of spaces) space.members.forEach((i, k) => { row[i] = k; });

  // -- the picture

  for (const space of spaces) for (const view of space.views) { // how far it reaches along either axis
    view.reach = [0, 1].map((axis) => view.xy.reduce((most, one) => Math.max(most, Math.abs(one[axis])), 1e-3));
  }
  const half = () => { // pixels to a unit, at scale 1: all points fit, both axes alike
    const [right, up] = spaces[state.space].views[state.view].reach;
    return Math.max(20, Math.min((size.width / 2 - 60) / right, (size.height / 2 - 28) / up));
  };
  const position = (i) => spaces[state.space].views[state.view].xy[row[i]];
  const place = (i) => {
    const [x, y] = position(i);
    return [size.width / 2 + (x - look.x) * half() * look.scale, size.height / 2 - (y - look.y) * half() * look.scale];
  };

  const trace = (on, kind, x, y, r) => {
    const polygon = (reach, corners, turn) => {
      for (let k = 0; k <= corners; k++) {
        const angle = turn + (2 * Math.PI * k) / corners;
        on[k ? "lineTo" : "moveTo"](x + reach * Math.cos(angle), y + reach * Math.sin(angle));
      }
    };
    switch (kind % 6) {
      case 0: on.moveTo(x + r, y); on.arc(x, y, r, 0, 2 * Math.PI); break;
      case 1: on.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8); break;
      case 2: polygon(r * 1.25, 3, -Math.PI / 2); break;
      case 3: polygon(r * 1.25, 4, 0); break;
      case 4: polygon(r * 1.2, 3, Math.PI / 2); break;
      default: polygon(r * 1.1, 6, 0);
    }
  };

  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    colours = { text: of("--text"), quiet: of("--quiet"), back: of("--back"), faint: of("--faint"), line: of("--line") };
    colours.kinds = kinds.map((_, k) => of(`--kind-${k % 6}`));
  };

  let asked = false;
  const draw = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; paint(); });
  };

  const paint = () => {
    context.setTransform(size.ratio, 0, 0, size.ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    const inside = ([x, y]) => x > -20 && y > -20 && x < size.width + 20 && y < size.height + 20;
    const radius = shown.length > 4000 ? RADIUS * 0.6 : shown.length > 800 ? RADIUS * 0.8 : RADIUS;
    context.fillStyle = colours.faint; // what the filters leave out stays, faintly, so that the picture keeps its shape
    context.globalAlpha = 0.5;
    context.beginPath();
    for (const i of spaces[state.space].members) {
      if (isShown[i]) continue;
      const at = place(i);
      if (inside(at)) { context.moveTo(at[0] + 2, at[1]); context.arc(at[0], at[1], 2, 0, 2 * Math.PI); }
    }
    context.fill();
    for (const pin of state.pins) if (spaceOf(pin) === state.space) lines(pin);
    if (state.at >= 0 && !state.pins.includes(state.at)) lines(state.at);
    const seen = [];
    for (let kind = 0; kind < kinds.length; kind++) {
      context.fillStyle = colours.kinds[kind];
      context.strokeStyle = colours.back;
      context.globalAlpha = 0.85;
      context.lineWidth = 1;
      context.beginPath();
      for (const i of shown) {
        if (points.kind[i] !== kind) continue;
        const at = place(i);
        if (inside(at)) { trace(context, kind, at[0], at[1], radius); seen.push(i); }
      }
      context.fill();
      if (shown.length <= 4000) context.stroke();
    }
    context.globalAlpha = 1;
    const marked = [...state.pins.filter((i) => spaceOf(i) === state.space), ...(state.at >= 0 ? [state.at] : [])];
    for (const i of marked) {
      const [x, y] = place(i);
      context.strokeStyle = colours.text;
      context.fillStyle = colours.kinds[points.kind[i]];
      context.lineWidth = 2;
      context.beginPath();
      trace(context, points.kind[i], x, y, RADIUS + 2);
      context.fill();
      context.stroke();
    }
    labels(marked, seen);
  };

  const lines = (i) => {
    const [x, y] = place(i);
    context.strokeStyle = colours.quiet;
    context.lineWidth = 1;
    points.near[i].forEach((j, k) => {
      const [u, v] = place(j);
      context.globalAlpha = Math.max(0.15, Math.min(1, points.cosine[i][k]));
      context.beginPath();
      context.moveTo(x, y);
      context.lineTo(u, v);
      context.stroke();
    });
    context.globalAlpha = 1;
  };

  const labels = (marked, seen) => {
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    const taken = seen.length > LABELS ? [] : seen.map((i) => {
      const [x, y] = place(i);
      return [x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS];
    });
    const clear = (box) => !taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3]);
    const write = (i, strong) => {
      const [x, y] = place(i), name = cut(points.name[i], 34), width = context.measureText(name).width + 4;
      const boxes = [[x + 9, y - 8, x + 9 + width, y + 8], [x - 9 - width, y - 8, x - 9, y + 8]]
        .filter((box) => box[0] >= 0 && box[2] <= size.width);
      const box = boxes.find(clear) ?? (strong ? boxes[0] ?? [x + 9, y - 8, x + 9 + width, y + 8] : undefined);
      if (!box) return;
      taken.push(box);
      context.fillStyle = colours.back;
      context.globalAlpha = 0.85;
      if (strong) context.fillRect(box[0], box[1], width, 16);
      context.globalAlpha = 1;
      context.fillStyle = strong ? colours.text : colours.quiet;
      context.fillText(name, box[0] + 2, y);
    };
    for (const i of marked) write(i, true);
    if (seen.length <= LABELS) for (const i of seen.sort((a, b) => a - b)) if (!marked.includes(i)) write(i, false);
  };

  const cut = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
  const spaceOf = (i) => points.space[i];

  // -- what a point tells

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };

  const tell = (i, into, withLinks) => {
    into.append(element("div", points.name[i], "name"));
    into.append(element("div", `${words(kinds[points.kind[i]])} in ${spaces[spaceOf(i)].name}`, "what"));
    const facts = element("dl");
    for (const line of points.source[i]) {
      const cutAt = line.indexOf(": ");
      facts.append(element("dt", words(line.slice(0, cutAt))), element("dd", line.slice(cutAt + 2)));
    }
    if (points.noise[i] !== null) facts.append(element("dt", "noise"), element("dd", points.noise[i].toPrecision(2)));
    if (facts.childElementCount) into.append(facts);
    if (!points.near[i].length) return;
    const table = element("table");
    table.append(element("caption", "nearest, by cosine"));
    points.near[i].forEach((j, k) => {
      const row = table.insertRow(), cell = row.insertCell();
      if (withLinks) {
        const link = element("button", points.name[j], "link");
        link.type = "button";
        link.addEventListener("click", () => go(j));
        cell.append(link);
      } else cell.textContent = cut(points.name[j], 60);
      row.insertCell().textContent = points.cosine[i][k].toFixed(3);
    });
    into.append(table);
  };
  const words = (kind) => kind.replace(/_/g, " ");

  const point = (i, aloud) => { // what is under the pointer or the keys; -1 for none
    if (i === state.at) return;
    state.at = i;
    canvas.classList.toggle("over", i >= 0);
    const near = $("near");
    near.replaceChildren();
    near.hidden = i < 0;
    if (i >= 0) {
      tell(i, near, false);
      const [x, y] = place(i), width = near.offsetWidth, height = near.offsetHeight;
      const left = x + 16 + width < size.width ? x + 16 : Math.max(4, x - 16 - width);
      near.style.left = `${left}px`;
      near.style.top = `${Math.max(4, Math.min(y + 12, size.height - height - 4))}px`;
      if (aloud) {
        const others = points.near[i].map((j, k) => `${points.name[j]} ${points.cosine[i][k].toFixed(2)}`);
        $("said").textContent = `${points.name[i]}, ${words(kinds[points.kind[i]])}. Nearest: ${others.join(", ") || "none"}`;
      }
    }
    draw();
  };

  const pin = (i) => {
    if (i < 0) return;
    state.pins = state.pins.includes(i) ? state.pins.filter((j) => j !== i) : [...state.pins, i].slice(-MOST_PINS);
    showPins();
    draw();
  };

  const showPins = () => {
    $("pinned").replaceChildren(...state.pins.map((i) => {
      const card = element("div", undefined, "card"), close = element("button", "×");
      close.type = "button";
      close.setAttribute("aria-label", `Unpin ${points.name[i]}`);
      close.addEventListener("click", () => { pin(i); canvas.focus(); });
      card.append(close);
      tell(i, card, true);
      return card;
    }));
  };

  const go = (i) => { // brings a point into view and pins it
    if (spaceOf(i) !== state.space) choose(spaceOf(i));
    if (!state.pins.includes(i)) pin(i);
    const [x, y] = place(i);
    if (x < 20 || y < 20 || x > size.width - 20 || y > size.height - 20) {
      [look.x, look.y] = position(i);
    }
    draw();
  };

  // -- filters

  const filter = () => {
    isShown = new Uint8Array(points.name.length);
    shown = spaces[state.space].members.filter((i) =>
      state.kinds.has(points.kind[i]) && state.words.every((word) => searched[i].includes(word)));
    for (const i of shown) isShown[i] = 1;
    if (state.at >= 0 && !isShown[state.at]) point(-1);
    $("count").textContent = `${shown.length} of ${spaces[state.space].members.length} points`;
    $("list").replaceChildren(...shown.slice(0, LISTED).map((i) => {
      const item = element("li"), link = element("button", points.name[i], "link");
      link.type = "button";
      link.addEventListener("click", () => go(i));
      link.addEventListener("focus", () => point(i));
      link.addEventListener("mouseenter", () => point(i));
      link.addEventListener("mouseleave", () => point(-1));
      link.addEventListener("blur", () => point(-1));
      item.append(link);
      return item;
    }));
    $("more").textContent = shown.length > LISTED ? `and ${shown.length - LISTED} more; find some of them by name` : "";
    draw();
  };

  const choose = (space) => {
    state.space = space;
    state.view = 0;
    $("space").value = String(space);
    $("view").replaceChildren(...spaces[space].views.map((view, k) => new Option(view.name, String(k))));
    document.querySelectorAll("#kinds .many").forEach((many, k) => {
      many.textContent = `(${spaces[space].members.filter((i) => points.kind[i] === k).length})`;
    });
    tellView();
    fit();
    point(-1);
    filter();
  };
  const tellView = () => { $("told").textContent = [spaces[state.space].views[state.view].told, ...data.notes].join(" "); };
  const fit = () => { Object.assign(look, { scale: 1, x: 0, y: 0 }); draw(); };

  const zoom = (factor, x = size.width / 2, y = size.height / 2) => {
    const scale = Math.min(400, Math.max(0.5, look.scale * factor)), by = half();
    look.x += ((x - size.width / 2) / by) * (1 / look.scale - 1 / scale);
    look.y -= ((y - size.height / 2) / by) * (1 / look.scale - 1 / scale);
    look.scale = scale;
    point(-1);
    draw();
  };

  // -- pointer and keys

  const nearest = (x, y, reach, allowed = () => true) => {
    let best = -1, least = reach * reach;
    for (const i of shown) {
      const [u, v] = place(i), away = (u - x) ** 2 + (v - y) ** 2;
      if (away < least && allowed(i, u, v)) { least = away; best = i; }
    }
    return best;
  };

  let drag = null;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    drag = { x: event.offsetX, y: event.offsetY, moved: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    const { offsetX: x, offsetY: y } = event;
    if (drag && (drag.moved || Math.hypot(x - drag.x, y - drag.y) > 4)) {
      look.x -= (x - drag.x) / (half() * look.scale);
      look.y += (y - drag.y) / (half() * look.scale);
      drag = { x, y, moved: true };
      canvas.classList.add("moving");
      point(-1);
      draw();
    } else if (!drag) point(nearest(x, y, REACH));
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) pin(nearest(event.offsetX, event.offsetY, REACH));
    drag = null;
    canvas.classList.remove("moving");
  });
  canvas.addEventListener("pointercancel", () => { drag = null; canvas.classList.remove("moving"); });
  canvas.addEventListener("pointerleave", () => { if (!drag) point(-1); });
  canvas.addEventListener("blur", () => point(-1));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
  }, { passive: false });

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const arrow = ARROWS[event.key];
    if (arrow) step(arrow);
    else if (event.key === "Enter" || event.key === " ") pin(state.at);
    else if (event.key === "Escape") { if (state.at >= 0) point(-1); else { state.pins = []; showPins(); draw(); } }
    else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") fit();
    else return;
    event.preventDefault();
  });

  const step = ([right, down]) => { // to the nearest point within 60 degrees of the arrow; the first: nearest the middle
    if (state.at < 0) { point(nearest(size.width / 2, size.height / 2, Infinity), true); return; }
    const from = state.at, [x, y] = place(from);
    const next = nearest(x, y, Infinity, (i, u, v) => {
      const ahead = (u - x) * right + (v - y) * down;
      return i !== from && ahead > 0 && ahead >= 0.5 * Math.hypot(u - x, v - y);
    });
    if (next < 0) return;
    const [u, v] = place(next);
    if (u < 0 || v < 0 || u > size.width || v > size.height) {
      [look.x, look.y] = position(next);
    }
    point(next, true);
  };

  // -- start

  const symbols = kinds.map(() => element("canvas", undefined, "symbol"));
  const drawSymbols = () => symbols.forEach((symbol, kind) => { // the legend's, by the same code as the map's
    const ratio = Math.max(1, devicePixelRatio || 1), on = symbol.getContext("2d");
    symbol.width = symbol.height = 14 * ratio;
    on.scale(ratio, ratio);
    on.fillStyle = colours.kinds[kind];
    on.beginPath();
    trace(on, kind, 7, 7, RADIUS);
    on.fill();
  });

  const theme = () => { readColours(); drawSymbols(); draw(); };
  const resize = () => {
    const box = canvas.getBoundingClientRect();
    Object.assign(size, { width: box.width, height: box.height, ratio: Math.max(1, devicePixelRatio || 1) });
    canvas.width = Math.round(size.width * size.ratio);
    canvas.height = Math.round(size.height * size.ratio);
    draw();
  };

  kinds.forEach((kind, k) => {
    const label = element("label"), box = element("input");
    Object.assign(box, { type: "checkbox", checked: true, value: kind });
    box.addEventListener("change", () => { state.kinds[box.checked ? "add" : "delete"](k); filter(); });
    label.append(box, symbols[k], `${words(kind)} `, element("span", "", "many"));
    $("kinds").append(label);
  });
  $("space").replaceChildren(...spaces.map((space, k) => new Option(space.name, String(k))));
  $("space").addEventListener("change", (event) => choose(Number(event.target.value)));
  $("view").addEventListener("change", (event) => { state.view = Number(event.target.value); tellView(); fit(); });
  $("search").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    filter();
  });
  $("closer").addEventListener("click", () => zoom(1.4));
  $("farther").addEventListener("click", () => zoom(1 / 1.4));
  $("all").addEventListener("click", fit);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
  if (!spaces.length) { $("count").textContent = "no points"; return; }
  new ResizeObserver(resize).observe(canvas);
  resize();
  theme();
  choose(0);
  canvas.placeOf = place; // where a point stands, in the canvas's own pixels: for programs that drive the page
})();
