// Adds a panel to OHIF's MONAI Label mode: what the bundled panel lacks. Loaded by the page itself; nothing is built.

import { element } from './dom.js';
import { askBeforeLeaving } from './leaving.js';
import { makePanel } from './panel.js';
import { BASE } from './server.js';
import * as viewer from './viewer.js';

const MODE = /\/monai-label\/?$/;
const BUNDLED = '.monaiLabelPanel';
const LOOK_MS = 500;
const CORNER_AFTER_MS = 15000;

// The bundled panel takes its server's address from here, and would look at port 8000 otherwise.
document.cookie = `MONAILABEL_SERVER_URL=${encodeURIComponent(BASE.href)}; path=/ohif; SameSite=Strict`;
document.head.append(element('link', { rel: 'stylesheet', href: new URL('panel.css', import.meta.url).href }));

askBeforeLeaving((path) => MODE.test(path));

const panel = makePanel(reconnect);
let since = null;
let shown = null;
let listening = false;

/** OHIF draws its panels anew whenever it likes, so this looks after ours again and again. */
function look() {
  if (!MODE.test(window.location.pathname)) return leave();
  since = since ?? Date.now();
  place();
  if (viewer.ready()) follow();
  return undefined;
}

function leave() {
  panel.node.remove();
  panel.stop();
  since = null;
  shown = null;
}

/** Before the bundled panel; in a corner where that one has not come or is folded away. */
function place() {
  const bundled = document.querySelector(BUNDLED);
  if (bundled && panel.node.nextSibling !== bundled) bundled.before(panel.node);
  if (!bundled && Date.now() - since > CORNER_AFTER_MS && panel.node.parentNode !== document.body) {
    document.body.append(panel.node);
  }
  panel.node.classList.toggle('samadapt-corner', panel.node.parentNode === document.body);
  if (panel.node.isConnected) panel.start();
}

/** Connect the bundled panel, which makes the segmentation, and tell ours which series is on the screen. */
function follow() {
  connect();
  if (!viewer.maskVolume()) return undefined;
  viewer.keepNames();
  viewer.shareColors();
  if (!listening) {
    listening = true;
    viewer.whenMaskChanges(() => requestAnimationFrame(panel.masked));
  }
  const { SeriesInstanceUID: series } = viewer.shownSeries();
  if (series === shown) return undefined;
  shown = series;
  return panel.shown(series);
}

let connected = null;

/** Each bundled panel once: OHIF makes another one when it is folded away and shown again. */
function connect() {
  const pressable = document.querySelector(`${BUNDLED} .settingsTable button`);
  if (!pressable || connected === pressable) return;
  connected = pressable;
  pressable.click();
}

/** The bundled panel numbers the model's structures as the server did when it was connected. */
function reconnect() {
  connected = null;
  if (viewer.maskVolume()) connect();
}

setInterval(look, LOOK_MS);
