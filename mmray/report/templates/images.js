// Pictures of samples with an overlay: a heat map, its mask, and the box of an object.
"use strict";
const MASKED = 0.95; // fraction of the pixels below the mask's threshold
const STOPS = [[0, 0, 4], [60, 9, 101], [129, 31, 124], [196, 60, 96], [244, 105, 52], [252, 172, 45], [252, 255, 164]];

function heat(value) {
  const at = Math.max(0, Math.min(1, value)) * (STOPS.length - 1);
  const first = Math.min(STOPS.length - 2, Math.floor(at));
  return STOPS[first].map((low, channel) => low + (at - first) * (STOPS[first + 1][channel] - low));
}

// Signed maps: red for positive values and blue for negative ones; transparent at 0.
const signed = (value) => (value >= 0 ? [225, 60, 40] : [40, 95, 230]);

function valuesOf(map) {
  const bytes = Uint8Array.from(atob(map.values), (letter) => letter.charCodeAt(0));
  return Array.from(bytes, (level) => map.low + (level / 255) * (map.high - map.low));
}

// Bilinear, with values at the centres of patches, as `upsample` in Python.
function upsampled(map, side) {
  const values = valuesOf(map), pixels = new Float64Array(side * side);
  const place = (pixel, count) => {
    const at = Math.max(0, Math.min(count - 1, ((pixel + 0.5) * count) / side - 0.5));
    const low = Math.floor(at);
    return [low, Math.min(count - 1, low + 1), at - low];
  };
  for (let y = 0; y < side; y++) {
    const [top, bottom, down] = place(y, map.rows);
    for (let x = 0; x < side; x++) {
      const [left, right, along] = place(x, map.columns);
      const at = (row, column) => values[row * map.columns + column];
      const above = at(top, left) * (1 - along) + at(top, right) * along;
      const below = at(bottom, left) * (1 - along) + at(bottom, right) * along;
      pixels[y * side + x] = above * (1 - down) + below * down;
    }
  }
  return pixels;
}

function overlay(map, how) {
  const side = 112, canvas = h("canvas", { width: side, height: side, "aria-hidden": "true" });
  const context = canvas.getContext("2d"), picture = context.createImageData(side, side);
  const pixels = upsampled(map, side), sorted = Float64Array.from(pixels).sort();
  const low = sorted[0], high = sorted[sorted.length - 1], most = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const threshold = sorted[Math.floor(MASKED * (sorted.length - 1))];
  pixels.forEach((value, index) => {
    const part = (value - low) / (high - low || 1);
    let [red, green, blue] = heat(part), alpha = 0.25 + 0.5 * part;
    if (how === "signed") [[red, green, blue], alpha] = [signed(value), 0.75 * (Math.abs(value) / most)];
    if (how === "mask") [[red, green, blue], alpha] = value > threshold ? [[252, 140, 40], 0.6] : [[0, 0, 0], 0.45];
    picture.data.set([red, green, blue, 255 * alpha], 4 * index);
  });
  context.putImageData(picture, 0, 0);
  return canvas;
}

function boxOf(box) {
  const space = "http://www.w3.org/2000/svg";
  const drawing = document.createElementNS(space, "svg");
  drawing.setAttribute("viewBox", "0 0 1 1");
  drawing.setAttribute("preserveAspectRatio", "none");
  for (const [colour, width] of [["#000", 0.022], ["#fff", 0.01]]) {
    const line = document.createElementNS(space, "rect");
    ["x", "y", "width", "height"].forEach((name, at) => line.setAttribute(name, box[at]));
    line.setAttribute("fill", "none");
    line.setAttribute("stroke", colour);
    line.setAttribute("stroke-width", width);
    drawing.append(line);
  }
  return drawing;
}

// Places a layer over a part of the image itself, without the margins of its square frame.
function fitted(image, layer, part = [0, 0, 1, 1]) {
  const place = () => {
    const wide = image.naturalWidth / image.naturalHeight || 1;
    const width = wide >= 1 ? 100 : 100 * wide, height = wide >= 1 ? 100 / wide : 100;
    Object.assign(layer.style, {
      display: "", width: `${width * part[2]}%`, height: `${height * part[3]}%`,
      left: `${(100 - width) / 2 + width * part[0]}%`, top: `${(100 - height) / 2 + height * part[1]}%`,
    });
  };
  if (image.complete) place();
  else {
    layer.style.display = "none";
    image.addEventListener("load", place, { once: true });
  }
  return layer;
}

function picture(sample, map = null, how = "heat") {
  const source = SOURCE.image(sample.id), words = sample.caption || DATA.captions[sample.id] || "sample";
  // A report of one file is bounded in size, and so has the most important pictures only.
  const why = INDEX.some_pictures ? "only in mmray report --pages" : "image not at hand";
  const none = h("span.picture.none", { role: "img", "aria-label": `${why}: ${words}` }, why);
  if (!source) return none;
  const said = map && how !== "image" ? `, with ${how === "mask" ? "the mask" : "the heat map"} of the neurons over it` : "";
  const image = h("img", { src: source, alt: `${words}${said}`, loading: "lazy", decoding: "async", onerror: () => frame.replaceWith(none) });
  const frame = h("span.picture", image);
  if (map && how !== "image") frame.append(fitted(image, overlay(map, how), map.covers || undefined));
  if (map && map.box) frame.append(fitted(image, boxOf(map.box)));
  return frame;
}

// The colours of a map from its lowest value to its highest.
const legend = (map) => h("span.legend", figure(map.low, 2), h("i", { style: `background:linear-gradient(to right, ${STOPS.map((channels) => `rgb(${channels.join(" ")})`).join(", ")})` }), figure(map.high, 2));

// A picture that opens larger, next to the image without its map.
function zoomable(sample, map = null, how = "heat") {
  const open = () => {
    const shown = h("dialog.zoomed", { onclick: () => shown.close(), onclose: () => shown.remove() },
      h("div.sides", map && picture({ ...sample, maps: {} }), picture(sample, map, how)),
      h("p", sample.caption || DATA.captions[sample.id] || ""), map && how === "heat" && legend(map), h("button.more", { type: "button" }, "Close"));
    document.body.append(shown);
    shown.showModal();
  };
  return h("button.zoom", { type: "button", onclick: open, "aria-label": `Enlarge: ${sample.caption || DATA.captions[sample.id] || "image"}` }, picture(sample, map, how));
}

// A caption with the words of a concept marked.
function caption(text, concept = "") {
  const words = String(text || "");
  // Lower case may change a text's length (İ becomes two characters); positions in it are then wrong.
  const lower = words.toLowerCase(), at = concept && lower.length === words.length ? lower.indexOf(concept) : -1;
  if (at < 0) return [words];
  return [words.slice(0, at), h("mark", words.slice(at, at + concept.length)), words.slice(at + concept.length)];
}

// A caption with the token of a neuron's example marked; the number of an image token before it.
function exampleCaption(row) {
  const text = DATA.captions[row.id];
  if (row.image_token) return [h("mark", `image token ${row.image_token[0]} of ${row.image_token[1]}`), " ", text || ""];
  if (!row.token || !text) return [text || ""];
  // Positions count characters; a string of JavaScript may have two units per character.
  const characters = [...text], [start, stop] = row.token, part = (from, to) => characters.slice(from, to).join("");
  return [part(0, start), h("mark", part(start, stop)), part(stop)];
}

function small(id, alt) {
  const source = id && SOURCE.image(id);
  return source ? h("img", { src: source, alt, loading: "lazy", onerror: (event) => event.target.remove() }) : null;
}
