// Label: structures, brush, clicks, the model's mask with its worth, and the submission.

import { button, capital, element, field, section } from './dom.js';
import { editedSlices, startFrom, takeModelMask, whenBundledFetches } from './edits.js';
import { segmentAll } from './inference.js';
import { pointer } from './pointer.js';
import { showQuality } from './quality.js';
import { clientId } from './client.js';
import { requestJson } from './server.js';
import * as viewer from './viewer.js';

const TOOLS = { Browse: 'WindowLevel', Brush: 'CircularBrush', Eraser: 'CircularEraser' };
const WHOLE = 'whole';
const EDITED = 'edited';

/** @param {{say: function, fail: function}} status */
export function labelSection(status) {
  const quality = element('div', { className: 'samadapt-quality' });
  const structures = structureChoice(status);
  const scope = scopeChoice();
  const guarded = (action) => () => action().catch(status.fail);
  const node = section(
    'Label',
    button('Segment', guarded(() => segment(status, quality)), { title: 'The model marks every learned structure' }),
    quality,
    structures.node,
    toolButtons(),
    pointer(structures.value, status),
    scope.node,
    button('Submit label', guarded(() => submit(status, scope)), { className: 'samadapt-primary' })
  );
  const refresh = () => {
    structures.refresh();
    scope.refresh();
  };
  watchBundled(scope.refresh);
  return { node, refresh };
}

async function segment(status, quality) {
  if (hasUnsent() && !window.confirm('The model’s mask takes the place of changes that were not submitted. Go on?')) return;
  status.say('The model looks at the series …');
  const { mask, message, quality: worth, model_version: version } = await segmentAll();
  if (mask) startFrom(mask);
  showQuality(quality, worth);
  status.say([version ? `Mask of ${version}.` : '', message || ''].join(' ').trim());
}

/** Slices where only the bundled panel's model has drawn are not edited. */
function watchBundled(refresh) {
  let fetched = false;
  whenBundledFetches(() => {
    fetched = true;
    setTimeout(take, 300);
  });
  const take = () => {
    if (!fetched || !viewer.maskVolume()) return;
    fetched = false;
    takeModelMask(viewer.voxels(), viewer.maskVolume().dimensions);
    refresh();
  };
}

// ---- structures

function structureChoice(status) {
  const select = element('select');
  const name = element('input', { type: 'text', placeholder: 'name', maxLength: 64 });
  select.addEventListener('change', () => viewer.setActiveStructure(Number(select.value)));
  const add = () => {
    const wanted = name.value.trim();
    if (!wanted) return status.fail(new Error('the new structure needs a name'));
    viewer.setActiveStructure(viewer.addStructure(wanted));
    name.value = '';
    refresh();
    return status.say(`Structure “${wanted}” is chosen.`);
  };
  name.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') add();
  });
  const refresh = () => refreshStructures(select);
  const node = element(
    'div',
    {},
    field('Structure', select),
    element('div', { className: 'samadapt-add' }, field('New', name), button('Add', async () => add()))
  );
  return { node, refresh, value: () => Number(select.value) };
}

function refreshStructures(select) {
  const known = [...viewer.structures()];
  const shown = [...select.options].map((option) => `${option.value} ${option.textContent}`);
  if (shown.join('\n') !== known.map(([value, name]) => `${value} ${name}`).join('\n')) {
    select.replaceChildren(...known.map(([value, name]) => element('option', { value, textContent: name })));
  }
  const active = viewer.activeStructure();
  if (viewer.structures().has(active)) select.value = active;
}

// ---- tools

function toolButtons() {
  const row = element('div', { className: 'samadapt-row', role: 'group', 'aria-label': 'Left mouse button' });
  const size = element('input', { type: 'range', min: 1, max: 40, value: 8 });
  for (const [text, tool] of Object.entries(TOOLS)) {
    const made = button(text, async () => {
      viewer.useTool(tool);
      viewer.setBrushSize(Number(size.value));
      for (const other of row.children) other.setAttribute('aria-pressed', String(other === made));
    });
    made.setAttribute('aria-pressed', 'false');
    row.append(made);
  }
  size.addEventListener('input', () => viewer.setBrushSize(Number(size.value)));
  return element('div', {}, row, field('Brush size', size));
}

// ---- submission

function scopeChoice() {
  const edited = element('span');
  const whole = scopeRadio(WHOLE, true);
  const some = scopeRadio(EDITED, false);
  const node = element(
    'fieldset',
    {},
    element('legend', { textContent: 'Submit' }),
    element('label', {}, whole, 'the whole volume'),
    element('label', {}, some, 'edited slices only: ', edited)
  );
  const slices = () => editedSlices(viewer.voxels(), viewer.maskVolume().dimensions);
  const refresh = () => {
    edited.textContent = viewer.maskVolume() ? inWords(slices()) : 'none';
  };
  return { node, refresh, value: () => (some.checked ? slices() : 'all') };
}

function scopeRadio(value, checked) {
  return element('input', { type: 'radio', name: 'samadapt-scope', value, checked });
}

/** Slices as people write them: "3–5, 9", by the numbers that OHIF shows. */
function inWords(slices) {
  const runs = [];
  for (const number of slices.map(viewer.sliceNumber).sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(', ') || 'none';
}

async function submit(status, scope) {
  const mask = readyMask();
  const names = viewer.structures();
  checkNames(mask, names);
  const edited = scope.value();
  if (edited.length === 0) throw new Error('no slice was edited since the last submission; choose the whole volume');
  status.say('The label is on its way …');
  const series = viewer.shownSeries().SeriesInstanceUID;
  const slices = together(submitted.get(series), edited);
  const reply = await send(mask, names, slices);
  submitted.set(series, slices);
  startFrom(mask);
  scope.refresh();
  status.say(['The label is safe.', ...(reply.warnings || []).map((words) => `${capital(words)}.`)].join(' '));
}

/** What this page has submitted of each series: a correction adds to it. */
const submitted = new Map();

/** Labelled slices: 'all', or numbers from 0. */
function together(before, now) {
  if (before === 'all' || now === 'all') return 'all';
  return [...new Set([...(before || []), ...now])].sort((a, b) => a - b);
}

/** Whether there are changes that nobody has submitted. */
export function hasUnsent() {
  return Boolean(viewer.maskVolume()) && editedSlices(viewer.voxels(), viewer.maskVolume().dimensions).length > 0;
}

function readyMask() {
  if (!viewer.maskVolume()) throw new Error('there is no mask yet; connect, or reload the page');
  viewer.keepNames();
  if (!viewer.maskFits()) throw new Error('the mask belongs to another series; open that one again, or reload the page');
  return viewer.voxels();
}

function checkNames(mask, names) {
  const nameless = new Set(mask);
  nameless.delete(0);
  for (const value of names.keys()) nameless.delete(value);
  if (nameless.size) throw new Error(`voxels of value ${[...nameless]} have no structure; add one and draw them with it`);
}

async function send(mask, names, slices) {
  const form = new FormData();
  const params = {
    label_info: [...names].map(([idx, name]) => ({ name, idx })),
    client_id: clientId(),
    labelled_slices: slices,
    shape: [...viewer.maskVolume().dimensions],
  };
  const uids = viewer.sliceUids();
  if (uids) params.slices = uids;
  form.set('params', JSON.stringify(params));
  form.set('label', await zipped(mask), 'label.bin.gz');
  const image = encodeURIComponent(viewer.shownSeries().SeriesInstanceUID);
  return requestJson(`samadapt/label?image=${image}`, { method: 'PUT', form });
}

function zipped(mask) {
  return new Response(new Blob([mask]).stream().pipeThrough(new CompressionStream('gzip'))).blob();
}
