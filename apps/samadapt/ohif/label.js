// Label: structures, brush, clicks, the model's mask with its worth, and the submission.

import { author, person, setAuthor } from './client.js';
import { button, capital, element, field, section } from './dom.js';
import { whenBundledFetches } from './edits.js';
import { segmentAll } from './inference.js';
import { pointer } from './pointer.js';
import { showQuality, slicesInWords } from './quality.js';
import { requestJson } from './server.js';
import { storedLabel } from './stored.js';
import { structureChoice } from './structures.js';
import { base, begin, edited, hasUnsent, isLooking, mindModel, standOn, standOnModel, together } from './unsent.js';
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
  const stored = storedLabel(status, () => refresh());
  const node = section(
    'Label',
    button('Segment', guarded(() => segment(status, quality)), { title: 'The model marks every learned structure' }),
    quality,
    stored.node,
    structures.node,
    toolButtons(),
    pointer(structures.value, status),
    scope.node,
    field('Your name', authorInput()),
    button('Submit label', guarded(() => submit(status, scope, stored)), { className: 'samadapt-primary' }),
    stored.versions
  );
  const refresh = () => {
    structures.refresh();
    scope.refresh();
  };
  watchBundled(scope.refresh);
  const shown = () => {
    begin();
    refresh();
  };
  return { node, refresh, shown, look: stored.look, keep: structures.keep };
}

/** Shown to other people with what was labelled; may be left empty. */
function authorInput() {
  const input = element('input', { type: 'text', value: author(), maxLength: 64, placeholder: 'shown with your labels' });
  input.addEventListener('change', () => setAuthor(input.value));
  return input;
}

async function segment(status, quality) {
  if (hasUnsent() && !window.confirm('The model’s mask takes the place of changes that were not submitted. Go on?')) return;
  status.say('The model looks at the series …');
  const { mask, message, quality: worth, model_version: version } = await segmentAll();
  if (mask) standOnModel(mask);
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
    mindModel();
    refresh();
  };
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
  const shown = element('span');
  const whole = scopeRadio(WHOLE, true);
  const some = scopeRadio(EDITED, false);
  const node = element(
    'fieldset',
    {},
    element('legend', { textContent: 'Submit' }),
    element('label', {}, whole, 'the whole volume'),
    element('label', {}, some, 'edited slices only: ', shown)
  );
  const refresh = () => {
    shown.textContent = viewer.maskFits() ? slicesInWords(edited()) : 'none';
  };
  return { node, refresh, value: () => (some.checked ? edited() : 'all') };
}

function scopeRadio(value, checked) {
  return element('input', { type: 'radio', name: 'samadapt-scope', value, checked });
}

async function submit(status, scope, stored) {
  if (isLooking()) throw new Error('another label is shown; choose yours or that one first');
  const mask = readyMask();
  const names = viewer.structures();
  checkNames(mask, names);
  const chosen = scope.value();
  if (chosen.length === 0) throw new Error('no slice was edited since the last submission; choose the whole volume');
  await place({ mask, names, slices: together(chosen) }, base(), status, scope, stored);
}

/** Put a label in the place of the version `replaced`; where another one counts, ask the person what to do. */
async function place(label, replaced, status, scope, stored) {
  readyMask(); // while somebody decides, OHIF may have come to show another series
  status.say('The label is on its way …');
  let reply;
  try {
    reply = await send(label, replaced);
  } catch (error) {
    if (error.where !== 'based_on') throw error;
    status.say('The label is not sent yet.');
    await stored.ask((other) => place(label, other, status, scope, stored));
    return;
  }
  standOn(reply.version, label.slices, label.mask);
  scope.refresh();
  status.say(['The label is safe.', ...(reply.warnings || []).map((words) => `${capital(words)}.`)].join(' '));
  await stored.submitted().catch(console.warn); // the label is safe; only the words about it are old
}

function readyMask() {
  if (!viewer.maskVolume()) throw new Error('there is no mask yet; connect, or reload the page');
  viewer.keepNames();
  if (!viewer.maskFits()) throw new Error('the page’s mask belongs to another series; press “Label this series”');
  return viewer.voxels();
}

function checkNames(mask, names) {
  const nameless = new Set(mask);
  nameless.delete(0);
  for (const value of names.keys()) nameless.delete(value);
  if (nameless.size) throw new Error(`voxels of value ${[...nameless]} have no structure; add one and draw them with it`);
}

async function send({ mask, names, slices }, replaced) {
  const form = new FormData();
  const params = {
    label_info: [...names].map(([idx, name]) => ({ name, idx })),
    ...person(),
    based_on: replaced,
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
