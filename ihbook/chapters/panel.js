// A panel in a page without a kernel: on input, fill each part's drawing with the numbers of the controls' state.
(() => {
  const panel = document.currentScript.parentElement;
  const { controls, parts } = JSON.parse(panel.querySelector('script[type="application/json"]').textContent);
  const views = panel.querySelectorAll(".ih-view");
  const form = panel.querySelector("form");
  const state = (name) => {
    const fields = [...form.elements].filter((field) => field.name === name);
    if (fields[0].type === "checkbox") return fields.map((field) => (field.checked ? "1" : "0")).join("");
    return (fields[0].type === "radio" ? fields.find((field) => field.checked) : fields[0]).value;
  };
  const draw = () => {
    for (const slider of form.querySelectorAll("input[type=range]")) {
      const words = JSON.parse(slider.dataset.options)[slider.value];
      slider.parentElement.querySelector("output").textContent = words;
      slider.setAttribute("aria-valuetext", words);
    }
    parts.forEach(({ template, follows, frames }, i) => {
      const values = frames[follows.map(state).join("|")];
      let next = 0;
      views[i].innerHTML = values.instead ?? template.replace(/{}/g, () => values[next++]);
    });
  };
  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
})();
