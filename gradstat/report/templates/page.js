"use strict";
// Unpacks plotly.js and the figures, and draws each chart when it comes into sight.
(async () => {
  const unpack = async (id) => {
    const packed = atob(document.getElementById(id).textContent.trim());
    const bytes = Uint8Array.from(packed, (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };
  const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

  // ---- what python left to be done ---------------------------------------------------------------
  const heatTraces = (heat, page) => {
    const codes = bytesOf(heat.codes), rows = codes.length / heat.columns;
    const z = [], bad = [], text = [];
    for (let row = 0; row < rows; row++) {
      const values = new Float32Array(heat.columns), marks = new Float32Array(heat.columns);
      for (let column = 0; column < heat.columns; column++) {
        const code = codes[row * heat.columns + column];
        values[column] = code === 0 || code === 255 ? NaN : heat.low + (code - 1) * heat.scale;
        marks[column] = code === 255 ? 1 : NaN;
      }
      z.push(values); bad.push(marks);
      text.push(new Array(heat.columns).fill(page.hover[row]));
    }
    const place = { type: "heatmap", x0: heat.first + (heat.width - 1) / 2, dx: heat.width, text, hoverongaps: false };
    const below = { orientation: "h", thickness: 10, len: 1, x: 0.5, y: 1.01, yanchor: "bottom", outlinewidth: 0,
      nticks: 6, tickangle: 0, title: { text: "log10 of norm", side: "top" } };
    const traces = [{ ...place, z, zmin: heat.zmin, zmax: heat.zmax, colorscale: "Viridis", colorbar: below,
      hovertemplate: "%{text}<br>step %{x:,.0f}: %{z:.2f}<extra></extra>" }];
    if (codes.includes(255)) {
      traces.push({ ...place, z: bad, showscale: false, zmin: 0, zmax: 1, colorscale: [[0, "--red"], [1, "--red"]],
        hovertemplate: "%{text}<br>step %{x:,.0f}: NaN or Inf<extra></extra>" });
    }
    return traces;
  };
  const histogramTraces = (histograms, row) => {
    const bytes = bytesOf(histograms.shares.bdata);
    const shares = new Uint16Array(bytes.buffer);
    const x = Array.from({ length: histograms.bins }, (_, bin) => histograms.first + bin);
    const part = (which) => Array.from(shares.subarray((2 * row + which) * histograms.bins, (2 * row + which + 1) * histograms.bins), (v) => v / 65535);
    const hover = (name) => `${name}: 2^%{x}: %{y:.1%}<extra></extra>`;
    return [
      { type: "bar", name: "newest", x, y: part(1), marker: { color: "--blue" }, hovertemplate: hover("newest") },
      { type: "scatter", mode: "lines", name: "first recorded", x, y: part(0), line: { color: "--orange", width: 2, shape: "hvh" }, hovertemplate: hover("first") },
    ];
  };

  // ---- colours and sizes -------------------------------------------------------------------------
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const coloured = (value, key = "") => {
    if (typeof value === "string") return /color$/.test(key) && value.startsWith("--") ? css(value) : value;
    if (key === "colorscale" && Array.isArray(value)) return value.map(([at, color]) => [at, css(color)]);
    if (!value || typeof value !== "object" || ArrayBuffer.isView(value)) return value;
    if (Array.isArray(value)) return typeof value[0] === "object" && !ArrayBuffer.isView(value[0]) ? value.map((inner) => coloured(inner)) : value;
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, coloured(inner, name)]));
  };
  const coarse = matchMedia("(pointer: coarse)").matches;
  const axis = (name, given, width) => ({
    gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"), tickfont: { color: css("--muted"), size: width < 480 ? 10 : 12 },
    automargin: true, fixedrange: coarse, ...given, title: { ...given.title, font: { color: css("--muted"), size: 12 }, ...(name.startsWith("y") && { standoff: 8 }) },
  });
  const layerTicks = (range, height, width, page) => {
    const first = Math.max(0, Math.ceil(Math.min(...range))), last = Math.min(page.wide.length - 1, Math.floor(Math.max(...range)));
    const every = Math.max(1, Math.ceil((last - first + 1) * 15 / height));
    const labels = width < 480 ? page.narrow : page.wide;
    const tickvals = [];
    for (let layer = Math.ceil(first / every) * every; layer <= last; layer += every) tickvals.push(layer);
    return { tickmode: "array", tickvals, ticktext: tickvals.map((layer) => labels[layer]) };
  };
  const layoutOf = (figure, plot, page) => {
    const width = plot.clientWidth, height = plot.clientHeight;
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: getComputedStyle(document.body).fontFamily, color: css("--text"), size: 12 },
      margin: { l: 8, r: 12, t: 34, b: 8 }, hovermode: "x unified", dragmode: coarse ? false : "zoom", height, autosize: true,
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: width < 480 ? 10 : 12 } },
      hoverlabel: { bgcolor: css("--raised"), bordercolor: css("--line"), font: { color: css("--text") }, namelength: -1 },
      ...coloured(figure.layout),
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      const given = layout[name];
      layout[name] = axis(name, given, width);
      if (given.layers) Object.assign(layout[name], layerTicks(given.range, height - 90, width, page));
      delete layout[name].layers;
    }
    return layout;
  };

  // ---- drawing -----------------------------------------------------------------------------------
  // One after the other: plotly cannot begin a chart anew while it is drawing it.
  const draw = (figure, page) => (figure.busy = (figure.busy ?? Promise.resolve()).then(() => drawNow(figure, page)));
  const drawNow = async (figure, page) => {
    const plot = document.getElementById(`plot-${figure.id}`);
    let data = figure.data;
    if (figure.heat) data = heatTraces(figure.heat, page);
    if (figure.histograms) data = histogramTraces(figure.histograms, document.getElementById("layer").value | 0);
    data = data.map((trace) => {
      const { named, ...rest } = coloured(trace);
      if (!named) return rest;
      const places = figure.places.get(trace);
      return { ...rest, text: places.map((layer) => page.hover[layer]), hovertemplate: "%{text}<br>%{x:.3~g}<extra>" + trace.name + "</extra>" };
    });
    const named = data.filter((trace) => trace.showlegend !== false && trace.type !== "heatmap").length;
    plot.style.height = `${figure.height + (plot.clientWidth < 480 ? 15 * Math.max(0, named - 2) : 0)}px`;
    const layout = layoutOf(figure, plot, page);
    await Plotly.react(plot, data, layout, {
      responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
      toImageButtonOptions: { filename: figure.id },
    });
    if (!plot.dataset.drawn) {
      plot.dataset.drawn = "yes";
      plot.on("plotly_relayout", (change) => {
        const zoomed = Object.keys(change).some((key) => key.startsWith("yaxis.range") || key === "yaxis.autorange");
        if (!zoomed || !figure.layout.yaxis?.layers) return;
        if (change["yaxis.autorange"]) change = { "yaxis.range": figure.layout.yaxis.range };
        const ticks = layerTicks(plot.layout.yaxis.range, plot.clientHeight - 90, plot.clientWidth, page);
        Plotly.relayout(plot, { "yaxis.tickvals": ticks.tickvals, "yaxis.ticktext": ticks.ticktext });
      });
    }
  };

  try {
    const [source, json] = await Promise.all([unpack("plotly"), unpack("figures")]);
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    const page = JSON.parse(json);
    const drawn = new Map();
    for (const figure of page.figures) {
      figure.places = new Map(figure.data.filter((trace) => trace.named).map((trace) => [trace, Array.from(new Int32Array(bytesOf(trace.y.bdata).buffer))]));
      drawn.set(document.getElementById(`plot-${figure.id}`), figure);
    }
    const seen = new IntersectionObserver((entries) => {
      for (const entry of entries.filter((e) => e.isIntersecting)) {
        seen.unobserve(entry.target);
        const figure = drawn.get(entry.target);
        if (!figure.busy) draw(figure, page);
      }
    }, { rootMargin: "300px" });
    drawn.forEach((_, plot) => seen.observe(plot));
    const again = () => drawn.forEach((figure) => figure.busy && draw(figure, page));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
    document.getElementById("layer")?.addEventListener("change", () => draw(page.figures.find((f) => f.histograms), page));
    addEventListener("beforeprint", () => drawn.forEach((figure) => figure.busy || draw(figure, page)));
    let width = innerWidth;
    addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; again(); } });
  } catch (error) {
    document.body.classList.add("failed");
    throw error;
  }
})();
