// Next sample: which image to label next, by which strategy, and the way there.

import { button, element, field, section, setOptions } from './dom.js';
import { clientId } from './client.js';
import { sliceButtons } from './quality.js';
import { requestJson } from './server.js';
import { hasUnsent } from './unsent.js';
import * as viewer from './viewer.js';

const STRATEGY = 'samadapt-strategy';
const SAMPLE = 'samadapt-sample';
const UNSENT = 'This mask has changes that were not submitted. Leave it?';

/** @param {{say: function, fail: function}} status */
export function samplesSection(status) {
  const strategy = element('select');
  strategy.addEventListener('change', () => sessionStorage.setItem(STRATEGY, strategy.value));
  const reason = element('div', { className: 'samadapt-reason' });
  const counts = element('p');
  const node = section(
    'Next sample',
    counts,
    field('Strategy', strategy),
    button('Next sample', () => next(strategy.value, status).catch(status.fail)),
    reason
  );
  const update = (info) => {
    const names = Object.keys(info.strategies);
    setOptions(strategy, names, sessionStorage.getItem(STRATEGY) || 'auto');
    counts.textContent = `${info.datastore.completed} of ${info.datastore.total} images are labelled.`;
  };
  return { node, update, arrive: () => arrive(reason) };
}

async function next(strategy, status) {
  if (hasUnsent() && !window.confirm(UNSENT)) return;
  status.say('The server looks for the next image …');
  const path = `activelearning/${encodeURIComponent(strategy)}`;
  const sample = await requestJson(path, { method: 'POST', json: { client_id: clientId() } });
  if (!sample.id) throw new Error(sample.message || 'there is no next image');
  if (!sample.StudyInstanceUID) throw new Error(`the next image, ${sample.id}, is in no study that OHIF can open`);
  sessionStorage.setItem(SAMPLE, JSON.stringify(sample));
  status.say('The image opens …');
  window.location.assign(viewer.addressOf(sample.StudyInstanceUID, sample.SeriesInstanceUID || sample.id));
}

/** Once a series is shown: if it is the proposed one, say why and go to the slice to begin with. */
function arrive(reason) {
  const sample = JSON.parse(sessionStorage.getItem(SAMPLE) || 'null');
  reason.replaceChildren();
  // Of a folder's volume the id is no series, and slices are counted in the file's order; OHIF shows its series.
  if (!sample || viewer.shownSeries().SeriesInstanceUID !== (sample.SeriesInstanceUID || sample.id)) return;
  reason.append(element('p', { textContent: `${sample.reason} (${sample.chosen_by})` }));
  const slices = sample.series_slices || sample.slices;
  if (!slices?.length) return;
  reason.append(sliceButtons('Begin with slice', slices));
  viewer.jumpToSlice(slices[0]);
}
