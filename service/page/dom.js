// Elements from names, attributes and children. Text is always text: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

/** An HTML element. Attributes that are null, undefined or false are left out; `onclick` and the like are listeners. */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** The element with an id, which the page has. */
export function byId(id) {
  return document.getElementById(id);
}

/** Say what went wrong in the place for it; nothing where there is nothing to say. */
export function showProblem(id, text) {
  const place = byId(id);
  place.hidden = !text;
  if (place.textContent !== text) place.textContent = text;
}

/** Give a select these options, [value, text] each, and keep what was chosen where it is still there. */
export function setOptions(select, options, none) {
  const entries = options.length || none === undefined ? options : [["", none]];
  const known = [...select.options].map((option) => `${option.value}\n${option.text}`).join("\n");
  if (known !== entries.map(([value, text]) => `${value}\n${text}`).join("\n")) {
    const chosen = select.value;
    select.replaceChildren(...entries.map(([value, text]) => element("option", { value }, text)));
    if (entries.some(([value]) => value === chosen)) select.value = chosen;
  }
  select.disabled = !options.length;
}
