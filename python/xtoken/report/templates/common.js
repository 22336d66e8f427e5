"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const count = (x) => x.toLocaleString("en");
// 0 % and 100 % are said of none and of all alone.
const percent = (share) => {
  const x = 100 * share;
  if (x === 0 || x === 100) return `${x} %`;
  return x < 0.1 ? "< 0.1 %" : `${Math.min(x, 99.9).toFixed(1)} %`;
};
// Text goes in as text: no token is ever read as markup.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const meter = (share, colour) => {
  const part = make("i");
  part.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  part.style.background = `var(--${colour})`;
  return make("span", { class: "meter", "aria-hidden": "true" }, part);
};
// What is wider than the page is scrolled by the keyboard too; what is not takes no stop of it.
const scrollers = [...document.querySelectorAll(".scroll")];
const reach = () => {
  for (const box of scrollers) {
    const wide = box.scrollWidth > box.clientWidth + 1;
    const title = box.closest("section")?.querySelector("h2, summary")?.textContent ?? "Table";
    for (const [name, value] of [["tabindex", "0"], ["role", "region"], ["aria-label", `${title}: a wide table`]]) {
      if (wide) box.setAttribute(name, value);
      else box.removeAttribute(name);
    }
  }
};
new ResizeObserver(reach).observe(byId("main"));
