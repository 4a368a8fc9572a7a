"use strict";
// The page of a report: draws the model, sorts and filters the table, opens the details of a row.
// Every text from the report enters the document as text, never as markup.
function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { rows, graph, colours } = data;
  const $ = (id) => document.getElementById(id);
  const canvas = $("canvas");
  const NS = canvas.querySelector("svg").namespaceURI;
  const READABLE = 0.7; // of the drawing's own size

  // ------------------------------------------------------------------ making elements

  function make(tag, attributes = {}, ...children) {
    const found = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    found.append(...children);
    return found;
  }

  function draw(tag, attributes = {}, ...children) {
    const found = document.createElementNS(NS, tag);
    for (const [key, value] of Object.entries(attributes)) found.setAttribute(key, value);
    found.append(...children);
    return found;
  }

  const colour = (cause) => colours[cause] || "#7f7f7f";
  const count = (n) => n.toLocaleString("en-US");
  const share = (found) => (found && found.elements ? found.differing / found.elements : 0);
  const local = (row) => share(row.local || row.cumulative);

  function percent(part) {
    if (!part) return "0%";
    if (part >= 0.9995 && part < 1) return "99.9%";
    return part >= 0.01 ? `${+(100 * part).toFixed(1)}%` : `${(100 * part).toPrecision(1)}%`;
  }

  // ------------------------------------------------------------------ the drawing

  const state = { folded: new Set(), zoom: 1, colour: "local", chosen: null };
  const nodes = new Map(graph.nodes.map((node) => [node.row, node]));
  const modules = new Map(); // path -> its nodes
  for (const node of graph.nodes)
    for (const path of node.groups)
      modules.set(path, [...(modules.get(path) || []), node]);
  for (const [path, inside] of modules) if (inside.length < 2) modules.delete(path);

  const hot = new Set(); // edges on the way of an error to an output
  rows.forEach((row, i) => {
    if (row.kind !== "output" || row.state === "equal") return;
    for (let at = i; rows[at].from !== null && rows[at].from !== undefined; at = rows[at].from)
      hot.add(`${rows[at].from}-${at}`);
  });

  /** What stands for a node: itself, or the outermost folded module that holds it. */
  function shown(index) {
    const folded = nodes.get(index).groups.find((p) => state.folded.has(p) && modules.has(p));
    return folded === undefined ? index : folded;
  }

  function members(key) {
    return typeof key === "number" ? [key] : modules.get(key).map((node) => node.row);
  }

  function box(key) {
    if (typeof key === "number") return nodes.get(key).box;
    const boxes = modules.get(key).map((node) => node.box);
    const left = Math.min(...boxes.map((b) => b[0] - b[2] / 2));
    const right = Math.max(...boxes.map((b) => b[0] + b[2] / 2));
    const top = Math.min(...boxes.map((b) => b[1] - b[3] / 2));
    const bottom = Math.max(...boxes.map((b) => b[1] + b[3] / 2));
    return [(left + right) / 2, (top + bottom) / 2, Math.max(150, 8 * key.length + 30), 44];
  }

  /** A map of one axis that shortens what folding left empty. */
  function squeeze(intervals, most, margin) {
    const sorted = [...intervals].sort((a, b) => a[0] - b[0]);
    const merged = [];
    for (const [low, high] of sorted) {
      const last = merged[merged.length - 1];
      if (last && low <= last[1]) last[1] = Math.max(last[1], high);
      else merged.push([low, high]);
    }
    const steps = [];
    let at = margin;
    merged.forEach(([low, high], i) => {
      if (i) at += Math.min(low - merged[i - 1][1], most);
      steps.push([low, high, at]);
      at += high - low;
    });
    const size = at + margin;
    function place(value) {
      for (let i = steps.length - 1; i >= 0; i--) {
        const [low, high, start] = steps[i];
        if (value >= low) {
          if (value <= high) return start + value - low;
          const next = steps[i + 1];
          if (!next) return start + (high - low) + Math.min(value - high, margin / 2);
          const gap = next[0] - high;
          return start + (high - low) + ((value - high) * (next[2] - start - high + low)) / gap;
        }
      }
      return Math.max(margin / 2, margin - ((steps[0] || [0])[0] - value));
    }
    return { place, size };
  }

  function tint(key) {
    const inside = members(key).map((i) => rows[i]);
    if (state.colour === "cause") {
      const total = new Map();
      for (const row of inside)
        for (const [cause, n] of row.causes) total.set(cause, (total.get(cause) || 0) + n);
      const own = [...total].filter(([cause]) => cause !== "upstream");
      const [best] = (own.length ? own : [...total]).sort((a, b) => b[1] - a[1]);
      return best ? { style: `fill: ${colour(best[0])}; fill-opacity: .5` } : null;
    }
    const worst = Math.max(
      ...inside.map((row) => (state.colour === "local" ? local(row) : share(row.cumulative)))
    );
    if (!worst) return null;
    // Logarithmic, from one code in 100000 up: on a linear scale a single code would stay white.
    const alpha = 0.1 + 0.55 * Math.max(0, 1 + Math.log10(worst) / 5);
    return { style: `fill: rgb(var(--mark)); fill-opacity: ${alpha.toFixed(3)}` };
  }

  function spoken(key) {
    if (typeof key === "number") {
      const row = rows[key];
      const why = row.causes.map(([cause, n]) => `${cause} ${count(n)}`).join(", ");
      return `${row.name}, ${row.op}: ${percent(local(row))} added here, ` +
        `${percent(share(row.cumulative))} by now${why ? `; ${why}` : ""}`;
    }
    const inside = members(key);
    const wrong = inside.filter((i) => rows[i].state === "differs").length;
    return `module ${key}, folded: ${inside.length} nodes, ${wrong} add differences; opens on click`;
  }

  function nodeOf(key, places) {
    const [x, y, width, height] = box(key);
    const left = places.x.place(x) - width / 2;
    const top = places.y.place(y) - height / 2;
    const folded = typeof key !== "number";
    const row = folded ? null : rows[key];
    const shape = { x: left, y: top, width, height, rx: 6 };
    const found = draw("g", {
      class: `node${folded ? " folded" : ""}${key === state.chosen ? " chosen" : ""}`,
      tabindex: "0", role: "button", "aria-label": spoken(key), "data-key": key,
    }, draw("rect", shape));
    const fill = tint(key);
    if (fill) found.append(draw("rect", { ...shape, ...fill, class: "tint" }));
    const middle = left + width / 2;
    const inside = members(key);
    const second = folded
      ? `${inside.length} nodes, ${inside.filter((i) => rows[i].state === "differs").length} add`
      : `${row.op} · ${percent(local(row))}`;
    const label = folded ? `▸ ${key}` : nodes.get(key).label;
    const at = { x: middle, "text-anchor": "middle" };
    found.append(
      draw("text", { ...at, y: top + 19 }, label),
      draw("text", { ...at, y: top + 35, class: "sub" }, second),
      draw("title", {}, spoken(key))
    );
    return found;
  }

  function edgeOf(from, to, points, isHot, places) {
    const X = places.x.place, Y = places.y.place;
    let path;
    if (points.length) {
      const pairs = [];
      for (let i = 0; i < points.length; i += 2) pairs.push(`${X(points[i])},${Y(points[i + 1])}`);
      path = `M${pairs[0]} C${pairs.slice(1).join(" ")}`;
    } else {
      const a = box(from), b = box(to);
      const x1 = X(a[0]), y1 = Y(a[1]) + a[3] / 2, x2 = X(b[0]), y2 = Y(b[1]) - b[3] / 2 - 7;
      const bend = Math.max(12, (y2 - y1) / 2);
      path = `M${x1},${y1} C${x1},${y1 + bend} ${x2},${y2 - bend} ${x2},${y2}`;
    }
    return draw("path", {
      d: path, class: `edge${isHot ? " hot" : ""}`,
      "marker-end": `url(#${isHot ? "hot" : "tip"})`,
    });
  }

  function tip(id, fill) {
    return draw("marker", {
      id, viewBox: "0 0 8 8", refX: 1, refY: 4, markerWidth: 7, markerHeight: 7,
      markerUnits: "userSpaceOnUse", orient: "auto",
    }, draw("path", { d: "M0,0 L8,4 L0,8 z", style: `fill: var(${fill})` }));
  }

  function outline(path, places, keys) {
    const inside = [...keys].filter((key) =>
      typeof key === "number" ? nodes.get(key).groups.includes(path) : key.startsWith(`${path}.`)
    );
    if (!inside.length || graph.by !== "dot") return null;
    // As many levels of outlines as stand inside of this one.
    const inner = inside.map((key) => (typeof key === "number" ? nodes.get(key).groups : [key])
      .filter((p) => p.startsWith(`${path}.`) && modules.has(p) && !state.folded.has(p)).length);
    const levels = 1 + Math.max(...inner);
    const sides = inside.map((key) => {
      const [x, y, w, h] = box(key);
      const cx = places.x.place(x), cy = places.y.place(y);
      return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2];
    });
    const left = Math.min(...sides.map((s) => s[0])) - 7 * levels;
    const top = Math.min(...sides.map((s) => s[1])) - 17 * levels;
    const right = Math.max(...sides.map((s) => s[2])) + 7 * levels;
    const bottom = Math.max(...sides.map((s) => s[3])) + 7 * levels;
    return draw("g", { class: "group", "data-group": path },
      draw("rect", { x: left, y: top, width: right - left, height: bottom - top, rx: 8 }),
      draw("text", { x: left + 4, y: top + 12, tabindex: "0", role: "button",
        "aria-label": `fold module ${path}` }, `▾ ${path}`));
  }

  function render() {
    const keys = new Set(graph.nodes.map((node) => shown(node.row)));
    const boxes = [...keys].map(box);
    const outlined = graph.nodes.some((n) => shown(n.row) === n.row && n.groups.length);
    const places = {
      x: squeeze(boxes.map(([x, , w]) => [x - w / 2, x + w / 2]), 40, 24),
      y: squeeze(boxes.map(([, y, , h]) => [y - h / 2, y + h / 2]), outlined ? 72 : 40, 44),
    };
    const svg = draw("svg", { role: "group", "aria-label": "the model as a graph",
      viewBox: `0 0 ${places.x.size} ${places.y.size}` });
    svg.append(draw("defs", {}, tip("tip", "--dim"), tip("hot", "--bad")));
    for (const path of modules.keys()) {
      const hidden = [...state.folded].some((f) => path === f || path.startsWith(`${f}.`));
      const drawn = hidden ? null : outline(path, places, keys);
      if (drawn) svg.append(drawn);
    }
    const seen = new Map();
    for (const [a, b, points] of graph.edges) {
      const from = shown(a), to = shown(b);
      if (from === to) continue;
      const whole = from === a && to === b;
      const key = `${from}|${to}`;
      const old = seen.get(key);
      seen.set(key, { from, to, points: whole ? points : [],
        hot: hot.has(`${a}-${b}`) || (old && old.hot) });
    }
    const edges = [...seen.values()].sort((a, b) => Number(a.hot) - Number(b.hot));
    for (const e of edges) svg.append(edgeOf(e.from, e.to, e.points, e.hot, places));
    for (const key of keys) svg.append(nodeOf(key, places));
    state.size = [places.x.size, places.y.size];
    canvas.replaceChildren(svg);
    scale();
  }

  function scale() {
    const svg = canvas.querySelector("svg");
    svg.setAttribute("width", state.size[0] * state.zoom);
    svg.setAttribute("height", state.size[1] * state.zoom);
  }

  /** All of the drawing into the window, but no smaller than that; the first node in sight. */
  function fit(least) {
    const room = (canvas.clientWidth - 4) / state.size[0];
    const tall = (canvas.clientHeight - 4) / state.size[1];
    state.zoom = Math.min(1, Math.max(Math.min(room, tall), least));
    scale();
    const first = canvas.querySelector(".node");
    if (!first) return;
    const a = first.getBoundingClientRect(), b = canvas.getBoundingClientRect();
    canvas.scrollTo(canvas.scrollLeft + a.left + a.width / 2 - b.left - b.width / 2, 0);
  }

  function fold(path, on) {
    if (on) state.folded.add(path);
    else state.folded.delete(path);
    render();
  }

  function act(target) {
    const node = target.closest(".node");
    if (node) {
      const key = node.dataset.key;
      if (node.classList.contains("folded")) fold(key, false);
      else choose(Number(key), true);
      return true;
    }
    const group = target.tagName === "text" && target.closest(".group");
    if (group) fold(group.dataset.group, true);
    return Boolean(group);
  }

  function focusNode(key) {
    const found = canvas.querySelector(`.node[data-key="${CSS.escape(String(key))}"]`);
    if (found) found.focus();
  }

  canvas.addEventListener("click", (event) => act(event.target));
  canvas.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      if (act(event.target)) event.preventDefault();
      return;
    }
    const node = event.target.closest(".node");
    if (!node || !["ArrowDown", "ArrowUp"].includes(event.key)) return;
    const down = event.key === "ArrowDown";
    const here = node.dataset.key;
    for (const [a, b] of graph.edges) {
      const [from, to] = [String(shown(a)), String(shown(b))];
      if (from !== to && (down ? from : to) === here) {
        event.preventDefault();
        focusNode(down ? to : from);
        return;
      }
    }
  });

  // ------------------------------------------------------------------ the details of a row

  function table(head, lines) {
    const body = lines.map((cells) =>
      make("tr", {}, ...cells.map((cell, i) =>
        i ? make("td", { class: "right" }, cell) : make("th", { scope: "row" }, cell))));
    const top = make("tr", {}, ...head.map((cell, i) =>
      make("th", i ? { scope: "col", class: "right" } : { scope: "col" }, cell)));
    return make("table", {}, make("thead", {}, top), make("tbody", {}, ...body));
  }

  function figures(row) {
    const sides = [["on the same inputs", row.local], ["accumulated", row.cumulative]];
    const known = sides.filter(([, found]) => found);
    const line = (head, cell) => [head, ...known.map(([, found]) => cell(found))];
    const lines = [
      line("differ", (d) => `${count(d.differing)} of ${count(d.elements)} (${percent(share(d))})`),
      line("largest, mean LSB", (d) => `${d.max_lsb}, ${d.mean_lsb}`),
      line("SQNR, dB", (d) => d.sqnr),
    ];
    if (row.kind !== "output") {
      lines.push(line("out of range", (d) => count(d.out_of_range)));
      const part = (n, d) => `${count(n)} (${percent(d.elements ? n / d.elements : 0)})`;
      lines.push(line("at the lowest code", (d) => part(d.saturated_low, d)));
      lines.push(line("at the highest code", (d) => part(d.saturated_high, d)));
    }
    const found = make("section", {}, make("h3", {}, "How much"),
      table(["", ...known.map(([head]) => head)], lines));
    if (row.quantization !== null)
      found.append(make("p", { class: "small" },
        `quantization itself: SQNR ${row.quantization} dB against the float model`));
    if (row.floor !== null)
      found.append(make("p", { class: "small" }, `noise floor: SQNR ${row.floor} dB`));
    return found;
  }

  /** One model's counts as a flight of stairs, a bin per code. */
  function stairs(counts, name, top, log) {
    const tall = (n) => (log ? Math.log10(1 + n) / Math.log10(1 + top) : n / top) * 98;
    const steps = counts.map((n, i) => `V${(100 - tall(n)).toFixed(2)}H${i + 1}`);
    return draw("path", { class: name, d: `M0,100${steps.join("")}V100` });
  }

  function histogram(row) {
    const { codes } = row;
    const found = make("section", {}, make("h3", {}, "Integer values (codes)"));
    if (!codes) {
      found.append(make("p", { class: "small" },
        row.kind === "output" ? "an output has no codes" : "not counted"));
      return found;
    }
    const both = [...codes.prepared, ...codes.converted];
    const top = Math.max(...both);
    const many = codes.prepared.length;
    const last = codes.first + many - 1;
    const grid = row.qparams.prepared;
    const svg = draw("svg", { class: "codes", viewBox: `0 0 ${many} 100`,
      preserveAspectRatio: "none", role: "img",
      "aria-label": `histograms of the codes ${codes.first} to ${last} of both models; ` +
        `largest bin ${count(top)}` });
    const show = (log) => {
      svg.replaceChildren();
      const low = grid.min - codes.first, high = grid.max + 1 - codes.first;
      if (low > 0) svg.append(draw("rect", { class: "outside", x: 0, y: 0, width: low, height: 100 }));
      if (high < many)
        svg.append(draw("rect",
          { class: "outside", x: high, y: 0, width: many - high, height: 100 }));
      svg.append(stairs(codes.prepared, "mine", top, log),
        stairs(codes.converted, "theirs", top, log));
    };
    show(true);
    const box = make("input", { type: "checkbox" });
    box.checked = true;
    box.addEventListener("change", () => show(box.checked));
    const axis = make("div", { class: "small top" },
      make("span", {}, String(codes.first)),
      make("span", { class: "push" }, String(last)));
    found.append(svg, axis, make("p", { class: "small top" },
      make("span", { class: "key mine" }), "prepared", make("span", { class: "key theirs" }),
      "converted", make("label", { class: "push" }, box, " logarithmic")));
    if (codes.first < grid.min || last > grid.max)
      found.append(make("p", { class: "small" }, "shaded: outside of the declared range"));
    return found;
  }

  function grids(row) {
    const { prepared, converted } = row.qparams;
    const found = make("section", {}, make("h3", {}, "Scale, zero point, range"));
    if (!prepared) {
      found.append(make("p", { class: "small" }, "a float output has none"));
      return found;
    }
    found.append(table(["", ""], [
      ["declared", `[${prepared.min}, ${prepared.max}] ${prepared.dtype}`],
      ["used in training", prepared.text],
      ["written by conversion", converted ? converted.text : "-"],
    ]));
    if (prepared.axis !== null)
      found.append(make("p", { class: "small" }, `per channel, axis ${prepared.axis}`));
    return found;
  }

  function why(row) {
    const found = make("section", {}, make("h3", {}, "Why"));
    const total = row.causes.reduce((sum, [, n]) => sum + n, 0);
    if (!total) found.append(make("p", {}, row.state === "equal" ? "nothing differs" : "no cause was asked for"));
    const inherited = ([cause]) => Number(cause === "upstream");
    for (const [cause, n] of [...row.causes].sort((a, b) => inherited(a) - inherited(b))) {
      const swatch = make("i");
      swatch.style.background = colour(cause);
      found.append(make("p", {}, make("span", { class: "cause" }, swatch,
        make("strong", {}, cause), `${count(n)} (${percent(n / total)})`)));
      for (const said of [row.evidence[cause], data.advice[cause]])
        if (said) found.append(make("p", { class: "small" }, said));
    }
    for (const said of [...row.problems, row.note].filter(Boolean))
      found.append(make("p", { class: "small warn" }, said));
    return found;
  }

  function remedy(row) {
    const found = make("section", {}, make("h3", {}, "What to do"));
    if (row.remedy) {
      const button = make("button", { type: "button" }, "Copy");
      button.addEventListener("click", () => {
        const done = () => { button.textContent = "Copied"; };
        if (navigator.clipboard) navigator.clipboard.writeText(row.remedy).then(done, select);
        else select();
      });
      const code = make("pre", {}, row.remedy);
      const select = () => getSelection().selectAllChildren(code);
      found.append(code, button);
      return found;
    }
    if (row.state === "equal") found.append(make("p", {}, "nothing"));
    else if (row.from !== null && row.causes.some(([cause]) => cause === "upstream"))
      found.append(make("p", {}, "look at the rows that it inherits from"));
    else found.append(make("p", {}, "no code repairs it; see the advice"));
    return found;
  }

  function link(index) {
    const found = make("a", { href: `#row-${index}` }, rows[index].name);
    found.addEventListener("click", (event) => {
      event.preventDefault();
      choose(index, true);
    });
    return found;
  }

  function where(row, index) {
    const found = make("section", {}, make("h3", {}, "Where"));
    const lines = [["op", row.op], ["module", row.module], ["source line", row.source],
      ["kernel", [row.kernel, row.engine && `on ${row.engine}`].filter(Boolean).join(" ")]];
    if (row.accumulator !== null)
      lines.push(["largest accumulator",
        `${count(row.accumulator)} (${percent(row.accumulator / (2 ** 31 - 1))} of int32)`]);
    if (row.saturation !== null)
      lines.push(["int16 saturation", row.saturation
        ? `possible without VNNI: ${count(row.saturation)} pairs of weights` : "impossible"]);
    found.append(table(["", ""], lines.filter(([, said]) => said)));
    for (const cell of found.querySelectorAll("td")) cell.className = "text";
    const path = [];
    for (let at = index; at !== null && at !== undefined; at = rows[at].from) path.unshift(at);
    if (path.length > 1) {
      const steps = path.slice(-8).flatMap((at, i) => [i ? " → " : "", link(at)]);
      found.append(make("p", { class: "small" }, "the error came by ",
        path.length > 8 ? "… → " : "", ...steps));
    }
    const weights = rows.flatMap((other, i) => (other.owner === index ? [i] : []));
    if (weights.length)
      found.append(make("p", { class: "small" }, "weight: ",
        ...weights.flatMap((i, n) => [n ? ", " : "", link(i), ` ${percent(local(rows[i]))} differ`])));
    if (row.owner !== null && row.owner !== undefined)
      found.append(make("p", { class: "small" }, "weight of ", link(row.owner)));
    return found;
  }

  function before(row) {
    if (!row.was) return [];
    const text = (r) => `${count((r.local || r.cumulative).differing)} on the same inputs, ` +
      `${count(r.cumulative.differing)} accumulated, SQNR ${r.cumulative.sqnr}`;
    const causes = row.was.causes.map(([cause, n]) => `${cause} ${count(n)}`).join(", ");
    return [make("section", {}, make("h3", {}, `${data.names[0]} → ${data.names[1]}`),
      table(["", ""], [[data.names[0], text(row.was)], [data.names[1], text(row)]]),
      make("p", { class: "small" }, causes && `${data.names[0]}: ${causes}`))];
  }

  function details(index) {
    const row = rows[index];
    return make("div", { class: "parts" }, ...before(row), why(row), remedy(row), where(row, index),
      histogram(row), figures(row), grids(row));
  }

  // ------------------------------------------------------------------ the table

  const body = $("sites") ? $("sites").tBodies[0] : document.createElement("tbody");
  const lines = new Map([...body.rows].map((line) => [Number(line.dataset.row), line]));
  const opened = new Map(); // row -> the line of its details

  function open(index, on) {
    const line = lines.get(index);
    if (!line || on === opened.has(index)) return;
    line.classList.toggle("open", on);
    line.querySelector("button").setAttribute("aria-expanded", String(on));
    if (!on) {
      opened.get(index).remove();
      opened.delete(index);
      return;
    }
    const cell = make("td", { colspan: line.cells.length }, details(index));
    const detail = make("tr", { class: "detail" }, cell);
    opened.set(index, detail);
    line.after(detail);
  }

  function choose(index, scroll) {
    state.chosen = index;
    for (const path of nodes.has(index) ? nodes.get(index).groups : []) state.folded.delete(path);
    render();
    const line = lines.get(index);
    if (!line) return;
    if (line.hidden) {
      for (const id of ["search", "which"]) $(id).value = "";
      $("equal").checked = true;
      filter();
    }
    open(index, true);
    if (scroll) {
      line.scrollIntoView({ block: "start" });
      line.querySelector("button").focus({ preventScroll: true });
    }
  }

  function reveal(index) {
    const at = nodes.has(index) ? index : rows[index].owner;
    const node = canvas.querySelector(`.node[data-key="${at}"]`);
    if (!node) return;
    const a = node.getBoundingClientRect(), b = canvas.getBoundingClientRect();
    canvas.scrollBy(a.left - b.left - b.width / 2, a.top - b.top - b.height / 2);
  }

  function filter() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const cause = $("which").value;
    let visible = 0;
    for (const [index, line] of lines) {
      const row = rows[index];
      const text = [row.name, row.op, row.module, row.kernel, row.kind, ...row.causes.map((c) => c[0])]
        .join(" ").toLowerCase();
      const fits = words.every((word) => text.includes(word)) &&
        (!cause || row.causes.some((c) => c[0] === cause)) &&
        ($("equal").checked || row.state !== "equal" || words.length > 0);
      line.hidden = !fits;
      if (!fits) open(index, false);
      visible += fits;
    }
    $("count").textContent = `${visible} of ${rows.length} rows shown`;
    for (const chip of document.querySelectorAll("[data-cause]"))
      chip.setAttribute("aria-pressed", String(chip.dataset.cause === cause));
  }

  const rank = {
    order: (row, i) => i,
    name: (row) => row.name,
    local: (row) => -local(row) || 0,
    cumulative: (row) => -share(row.cumulative),
    sqnr: (row) => row.cumulative.rank,
    lsb: (row) => -((row.local || row.cumulative).max_lsb),
    out: (row) => -row.cumulative.out_of_range,
    causes: (row) => (row.causes[0] ? row.causes[0][0] : "\uffff"),
  };

  function sort(key, reverse) {
    // A weight stands under its op.
    const at = (i) => (rows[i].owner ?? i);
    const by = (i) => rank[key](rows[at(i)], at(i));
    const ordered = [...lines.keys()].sort((a, b) => {
      const x = by(a), y = by(b);
      const first = x < y ? -1 : x > y ? 1 : at(a) - at(b);
      if (first) return reverse ? -first : first;
      return Number(a !== at(a)) - Number(b !== at(b)) || a - b;
    });
    for (const index of ordered) {
      body.append(lines.get(index));
      if (opened.has(index)) body.append(opened.get(index));
    }
    for (const head of document.querySelectorAll("#sites thead th")) {
      const own = head.dataset.sort === key;
      // What starts with the largest figure is a descending order.
      const falls = !["name", "causes", "order", "sqnr"].includes(key);
      head.setAttribute("aria-sort", own ? (falls !== reverse ? "descending" : "ascending") : "none");
    }
    $("by").value = key;
    state.sort = key;
    state.reverse = reverse;
  }

  // ------------------------------------------------------------------ start

  function on(id, event, act) {
    if ($(id)) $(id).addEventListener(event, act);
  }

  document.addEventListener("click", (event) => {
    const head = event.target.closest("#sites thead th[data-sort]");
    if (head) {
      const key = head.dataset.sort;
      sort(key, state.sort === key && !state.reverse);
      return;
    }
    const chip = event.target.closest("[data-cause]");
    if (chip) {
      $("which").value = $("which").value === chip.dataset.cause ? "" : chip.dataset.cause;
      filter();
      return;
    }
    const line = event.target.closest("#sites tbody tr[data-row]");
    if (line && !getSelection().toString()) {
      const index = Number(line.dataset.row);
      const now = !opened.has(index);
      open(index, now);
      if (now) {
        state.chosen = index;
        for (const path of nodes.has(index) ? nodes.get(index).groups : []) state.folded.delete(path);
        render();
        reveal(index);
      }
    }
  });
  for (const id of ["search", "which", "equal"]) on(id, "input", filter);
  on("by", "change", (event) => sort(event.target.value, false));
  on("colour", "change", (event) => { state.colour = event.target.value; render(); });
  on("fold", "click", () => {
    for (const path of modules.keys()) state.folded.add(path);
    render();
    fit(READABLE);
  });
  on("unfold", "click", () => { state.folded.clear(); render(); });
  on("in", "click", () => { state.zoom = Math.min(3, state.zoom * 1.25); scale(); });
  on("out", "click", () => { state.zoom = Math.max(0.1, state.zoom / 1.25); scale(); });
  on("fit", "click", () => fit(0));
  on("theme", "click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme
      ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    render();
  });
  if (!rows.length) return;
  for (const tools of document.querySelectorAll(".tools[hidden]")) tools.hidden = false;
  $("equal").checked = rows.every((row) => row.state === "equal");
  if (graph.nodes.length > 60) for (const path of modules.keys()) state.folded.add(path);
  sort("local", false);
  filter();
  render();
  fit(READABLE);
}

// Behind the first paint, so that a reader of a large report waits for nothing.
requestAnimationFrame(() => setTimeout(() => {
  start();
  document.documentElement.dataset.ready = "";
}));
