// Whether the server has the series that is shown; it fetches it from the PACS meanwhile.

import { requestJson } from './server.js';

const LOOK_MS = 1000;
const WAITING = ['absent', 'fetching'];

/**
 * Ask the server to fetch a series and say how far it is.
 * @param {function(): boolean} wanted whether it still matters
 * @returns {Promise<boolean>} whether the server has it
 */
export async function fetchSeries(uid, status, wanted) {
  const path = `samadapt/series/${encodeURIComponent(uid)}`;
  let found = await requestJson(path, { method: 'POST', quiet: true });
  let said = false;
  while (WAITING.includes(found.state) && wanted()) {
    said = true;
    const far = found.total ? `: ${found.done} of ${found.total} images.` : ' …';
    status.say(`The server fetches the series${far}`);
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
    found = await requestJson(path, { quiet: true });
  }
  if (!wanted()) return false;
  if (found.state === 'ready') {
    if (said) status.say('The server has the series.');
  } else {
    status.fail(new Error(`this series cannot be labelled: ${found.reason || found.state}`));
  }
  return found.state === 'ready';
}
