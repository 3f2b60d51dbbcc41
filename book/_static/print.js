// Paper is white: a page is printed in the theme's light colours, also where the reader's screen is dark.
{
  const page = document.documentElement.dataset;
  let shown;
  addEventListener("beforeprint", () => { shown = page.theme; page.theme = "light"; });
  addEventListener("afterprint", () => { page.theme = shown; });
}
