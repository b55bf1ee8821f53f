(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paper = "#1c2126";
  const ink = () => getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
  const paint = (colour) => {
    for (const plot of document.querySelectorAll(".js-plotly-plot")) {
      Plotly.relayout(plot, {"font.color": colour});
    }
  };
  const unpacked = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip")));
  };
  const config = {
    responsive: true, displaylogo: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d"]],
  };

  // On a phone a scale of colours beside the picture would take half of the width, and a map's axes
  // are read from their ticks.
  const narrow = (place, data, layout) => {
    const scales = data.filter(({colorbar}) => colorbar);
    if (scales.length) for (const axis of [layout.xaxis, layout.yaxis]) delete axis.title;
    for (const {colorbar} of scales) {
      Object.assign(colorbar, {orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom"});
    }
    if (!scales.length) return;
    layout.margin.t += 50;
    layout.height += 50;
    place.style.height = `${layout.height}px`;
  };

  // What is folded is drawn when it is first unfolded: plotly cannot measure what is not shown.
  const figures = new Map();
  const drawOne = (place, {data, layout}) => {
    layout.font = {...layout.font, color: ink()};
    if (place.clientWidth < 480) narrow(place, data, layout);
    return Plotly.newPlot(place, data, layout, config);
  };
  const draw = async (root) => {
    for (const place of root.querySelectorAll("[data-figure]")) {
      if (!place.dataset.figure || place.closest("details:not([open])")) continue;
      const packed = place.dataset.figure;
      delete place.dataset.figure;
      await drawOne(place, figures.get(place) ?? await unpacked(packed).json());
    }
  };

  // Paper cannot be unfolded, so everything is open in print. A browser prints as soon as the
  // handlers of `beforeprint` have returned, which leaves no time to unpack a figure: those of
  // folded sections are unpacked when the page has been drawn.
  const unpackFolded = async () => {
    for (const place of document.querySelectorAll("[data-figure]")) {
      const figure = await unpacked(place.dataset.figure).json();
      if (place.dataset.figure) figures.set(place, figure);
    }
  };
  let openedForPrint = [];
  const openForPrint = () => {
    openedForPrint = [...document.querySelectorAll("details:not([open])")];
    for (const part of openedForPrint) part.open = true;
    for (const [place, figure] of figures) {
      if (!place.dataset.figure) continue;
      delete place.dataset.figure;
      drawOne(place, figure);
    }
    paint(paper);
  };
  const foldAfterPrint = () => {
    for (const part of openedForPrint) part.open = false;
    paint(ink());
  };
  const unfold = () => {
    const target = document.getElementById(location.hash.slice(1));
    for (let at = target; at; at = at.parentElement) if (at.matches("details")) at.open = true;
    if (target) draw(document);
    target?.scrollIntoView();
  };
  draw(document).then(unpackFolded);
  unfold();
  document.addEventListener("toggle", ({target}) => draw(target), true);
  window.addEventListener("hashchange", unfold);
  dark.addEventListener("change", () => paint(ink()));
  window.addEventListener("beforeprint", openForPrint);
  window.addEventListener("afterprint", foldAfterPrint);

  const fold = (button) => {
    const parts = [...button.closest(".prompt, body").querySelectorAll("details:not(.prompt)")];
    const open = parts.some((part) => !part.open);
    for (const part of parts) part.open = open;
    button.textContent = open ? "Fold all" : "Unfold all";
  };
  const give = (name, href) => Object.assign(document.createElement("a"), {download: name, href}).click();
  const saveNumbers = async ({dataset}) => {
    const text = await unpacked(dataset.csv).blob();
    give(dataset.name, URL.createObjectURL(new Blob([text], {type: "text/csv"})));
  };
  const savePicture = async ({dataset}, figure) => {
    const plot = figure.querySelector(".js-plotly-plot");
    const {title} = plot.layout.meta;
    const {margin} = plot.layout;
    const size = {width: 900, height: plot.offsetHeight + 20};
    const layout = {
      ...plot.layout, ...size, title, autosize: false, paper_bgcolor: "#ffffff",
      font: {...plot.layout.font, color: paper}, margin: {...margin, t: margin.t + 20},
    };
    const scale = dataset.save === "png" ? 3 : 1;
    const made = await Plotly.toImage(
      {data: plot.data, layout}, {format: dataset.save, ...size, scale});
    give(`${figure.dataset.file}.${dataset.save}`, made);
  };
  const point = (token) => {
    const text = token.closest(".said");
    text.querySelector(".chosen")?.classList.remove("chosen");
    token.classList.add("chosen");
    text.parentElement.querySelector(".note").textContent = token.dataset.note;
  };
  document.addEventListener("click", ({target}) => {
    if (target.matches("[data-fold]")) fold(target);
    if (target.matches("[data-save]")) savePicture(target, target.closest("figure"));
    if (target.matches("[data-csv]")) saveNumbers(target);
  });
  for (const event of ["mouseover", "click"]) {
    document.addEventListener(event, ({target}) => {
      if (target.matches(".said [data-note]")) point(target);
    });
  }
  document.addEventListener("keydown", (pressed) => {
    const step = {ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling"}[pressed.key];
    const next = step && pressed.target.matches(".said") && pressed.target.querySelector(".chosen")[step];
    if (next) {
      pressed.preventDefault();
      point(next);
      next.scrollIntoView({block: "nearest"});
    }
  });
})();
