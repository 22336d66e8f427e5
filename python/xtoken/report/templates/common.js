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
