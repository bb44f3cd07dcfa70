// The label that the server has of the shown series: whose it is, the way into the mask, and its versions.

import { person } from './client.js';
import { button, capital, element } from './dom.js';
import { checkFits, showMask } from './masks.js';
import { maker, moment } from './names.js';
import { readNrrd } from './nrrd.js';
import { slicesInWords } from './quality.js';
import { request, requestJson } from './server.js';
import { base, hasUnsent, layAside, standOn, takeBack } from './unsent.js';
import * as viewer from './viewer.js';

const DROP = 'The stored label takes the place of changes that were not submitted. Go on?';

/**
 * What is said of the stored label, the list of its versions, and the question that comes up where two people label
 * one series.
 * @param {{say: function, fail: function}} status
 * @param {function} changed told when another mask is shown
 */
export function storedLabel(status, changed) {
  const view = makeView(() => load().catch(status.fail));

  const load = async () => {
    if (!hasUnsent() || window.confirm(DROP)) await show(await latest(), 'is shown');
  };

  const show = async (label, words, still = () => true) => {
    const mask = await fetchMask(label.name);
    if (!still()) return;
    standOn(label.name, label.labelled_slices, showMask(mask.voxels, mask.names));
    changed();
    status.say(`The label of ${maker(label)} ${words}.`);
  };

  /** Ask the server anew; a label is shown by itself where the mask is empty and stays so. */
  const look = async (wanted) => {
    const label = await latest();
    if (!wanted()) return;
    view.describe(label);
    const empty = () => wanted() && viewer.maskFits() && !viewer.voxels().some(Boolean) && !hasUnsent();
    if (label && empty()) await show(label, 'is shown; corrections add to it', empty);
    else if (!viewer.maskFits()) status.say('The mask in this page belongs to another series.');
    else if (label && base() !== label.name) status.say('This series has a label; “Load label” shows it.');
    await listVersions(label);
  };

  const listVersions = async (label) => {
    const known = label ? (await requestJson(address('/versions'), { quiet: true })).versions : [];
    view.list(known, (version) => restore(version, label.name).catch(refused));
  };

  const refused = (error) => {
    status.fail(error);
    return refresh().catch(console.warn);
  };

  const restore = async (version, counting) => {
    if (hasUnsent() && !window.confirm(DROP)) return;
    await requestJson(address('/restore', version.name), { method: 'POST', json: { ...person(), based_on: counting } });
    const label = await refresh();
    await show(label, 'counts again');
  };

  /** Say what the server has now, without a change of the mask. */
  const refresh = async () => {
    const label = await latest();
    view.describe(label);
    await listVersions(label);
    return label;
  };

  /**
   * Another label came that this mask does not stand on: what now?
   * @param {function(string): Promise} replace sends the mask in the place of the version of that name
   */
  const ask = async (replace) => {
    const label = await refresh();
    const when = `${capital(maker(label))} submitted a label on ${moment(label.time)}, which your mask does not stand on.`;
    view.ask(`${when} Yours is not sent yet; the other is kept in any case.`, {
      'Look at it first': () => lookFirst(label, replace).catch(status.fail),
      'Replace it': () => replace(label.name).catch(status.fail),
      'Not now': () => view.close(),
    });
  };

  const lookFirst = async (label, replace) => {
    const { voxels, names } = await fetchMask(label.name);
    layAside();
    showMask(voxels, names);
    changed();
    view.ask(`This is the label of ${maker(label)}; your mask is kept meanwhile.`, {
      'Back to mine': () => {
        takeBack();
        changed();
        return ask(replace).catch(status.fail);
      },
      'Go on with this one': () => {
        view.close();
        return show(label, 'is shown; corrections add to it').catch(status.fail);
      },
    });
  };

  const submitted = async () => {
    view.close();
    await refresh();
  };
  return { node: view.node, versions: view.versions, look, ask, submitted };
}

function makeView(load) {
  const said = element('p', { className: 'samadapt-stored' });
  const again = button('Load label', load, { hidden: true });
  const elsewhere = button('Label this series', async () => openShown(), { hidden: true });
  const rows = element('tbody');
  const summary = element('summary', { textContent: 'Versions of this label' });
  const versions = element('details', { hidden: true }, summary, element('table', {}, rows));
  const question = element('div', { role: 'alertdialog', 'aria-label': 'Another label', className: 'samadapt-question', hidden: true });

  const describe = (label) => {
    elsewhere.hidden = viewer.maskFits();
    again.hidden = !label || !viewer.maskFits();
    const made = label && `${label.restored ? 'Restored' : 'Labelled'} by ${maker(label)} on ${moment(label.time)}`;
    said.textContent = label ? `${made}: ${contents(label)}.` : 'Not labelled yet.';
  };
  const list = (known, restore) => {
    versions.hidden = known.length < 2;
    rows.replaceChildren(...known.map((version) => row(version, () => restore(version))));
  };
  /** @param {Object<string, function>} answers what the buttons say and do; the first is the one that loses nothing */
  const ask = (words, answers) => {
    const choices = Object.entries(answers).map(([text, action]) => button(text, async () => action()));
    question.replaceChildren(element('p', { textContent: words }), ...choices);
    question.hidden = false;
    choices[0].focus();
  };
  const close = () => {
    question.hidden = true;
  };
  return { node: element('div', {}, said, again, elsewhere, question), versions, describe, list, ask, close };
}

/** The bundled panel makes one mask a page, for the series that the page was opened with. */
function openShown() {
  const { StudyInstanceUID: study, SeriesInstanceUID: series } = viewer.shownSeries();
  window.location.assign(viewer.addressOf(study, series));
}

function contents(label) {
  if (!label.slices.length) return 'nothing is drawn';
  const partly = label.labelled_slices === 'all' ? '' : `; slices ${slicesInWords(label.labelled_slices)} count as labelled`;
  return `${label.structures.join(', ') || 'nameless structures'} in slices ${slicesInWords(label.slices)}${partly}`;
}

function row(version, restore) {
  const made = `${version.restored ? 'restored by ' : ''}${maker(version)}, ${moment(version.time)}`;
  const again = button('Restore', restore, { 'aria-label': `Restore the label of ${made}` });
  return element(
    'tr',
    {},
    element('th', { scope: 'row', textContent: made }),
    element('td', { textContent: version.structures.join(', ') || 'nothing that has a name' }),
    element('td', {}, version.served ? 'counts' : again)
  );
}

/** What the server has of the shown series now; null: nothing. */
async function latest() {
  return (await requestJson(address(''), { quiet: true })).label;
}

/** A version's mask, in its own values. @returns {Promise<{voxels: Uint8Array, names: Map<number, string>}>} */
async function fetchMask(version) {
  const series = viewer.shownSeries().SeriesInstanceUID;
  const reply = await request(address('/mask', version));
  const mask = readNrrd(await reply.arrayBuffer());
  checkFits(mask.sizes, series);
  return mask;
}

function address(part, version = null) {
  const query = new URLSearchParams({ image: viewer.shownSeries().SeriesInstanceUID });
  if (version !== null) query.set('version', version);
  return `samadapt/label${part}?${query}`;
}
