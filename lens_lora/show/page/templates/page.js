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

  const point = (token) => {
    const text = token.closest(".said");
    text.querySelector(".chosen")?.classList.remove("chosen");
    token.classList.add("chosen");
    text.parentElement.querySelector(".note").textContent = token.dataset.note;
  };
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
