(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
    for (const plot of document.querySelectorAll(".plotly-graph-div")) {
      Plotly.relayout(plot, {"font.color": ink});
    }
  };
  const choose = document.getElementById("choose");
  const shown = document.getElementById("shown");
  const show = () => {
    shown.querySelectorAll(".plotly-graph-div").forEach(Plotly.purge);
    shown.replaceChildren(document.getElementById(choose.value).content.cloneNode(true));
    paint();
  };
  if (choose) {
    const wanted = location.hash.slice(1);
    if ([...choose.options].some((option) => option.value === wanted)) choose.value = wanted;
    choose.addEventListener("change", () => {
      history.replaceState(null, "", "#" + choose.value);
      show();
    });
    show();
  } else {
    paint();
  }
  dark.addEventListener("change", paint);
})();
