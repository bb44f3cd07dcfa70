// The panel: its sections, what it says, and how it keeps up with the server.

import { capital, element } from './dom.js';
import { labelSection } from './label.js';
import { modelsSection } from './models.js';
import { samplesSection } from './samples.js';
import { fetchSeries } from './series.js';
import { requestJson, whenSlow } from './server.js';
import { trainingSection } from './training.js';

const POLL_MS = 5000;
const POLL_TRAINING_MS = 1500;
const POLL_AWAY_MS = 3000;

/**
 * @param {function} renamed told when the server has other structures than before
 * @returns {{node: HTMLElement, start: function, stop: function, shown: function, masked: function}}
 */
export function makePanel(renamed) {
  const status = makeStatus();
  const label = labelSection(status);
  const samples = samplesSection(status);
  const training = trainingSection(status, () => poll.now());
  const models = modelsSection(status);
  const node = element(
    'section',
    { id: 'samadapt-panel', 'aria-label': 'samadapt' },
    element('h2', { textContent: 'samadapt' }),
    status.node,
    label.node,
    samples.node,
    training.node,
    models.node
  );
  let structures = null;
  const poll = makePolling(status, async (info) => {
    const now = JSON.stringify(info.models.samadapt.labels);
    if (structures !== null && structures !== now) renamed();
    structures = now;
    samples.update(info);
    label.keep(info.labels);
    const { running, ended } = training.update(info);
    if (ended || poll.first()) await models.refresh();
    return running;
  });
  let series = null;
  const shown = (uid) => {
    series = uid;
    const wanted = () => series === uid;
    label.shown();
    samples.arrive();
    const here = fetchSeries(uid, status, wanted);
    return here.then((ready) => ready && label.look(wanted)).catch(status.fail);
  };
  return { node, start: poll.start, stop: poll.stop, shown, masked: label.refresh };
}

/** What the panel says last; read out by screen readers. */
function makeStatus() {
  const text = element('p', { role: 'status', 'aria-live': 'polite', className: 'samadapt-status' });
  const slow = element('p', { role: 'status', 'aria-live': 'polite', className: 'samadapt-slow' });
  const set = (words, bad) => {
    text.textContent = capital(words);
    text.classList.toggle('samadapt-bad', bad);
  };
  whenSlow((is) => {
    slow.textContent = is ? 'The server is busy; its answer is awaited.' : '';
  });
  return {
    node: element('div', {}, text, slow),
    say: (words) => set(words, false),
    fail: (error) => {
      set(error.message, true);
      if (!error.status && error.away === undefined) console.warn(error);
    },
    away: (is) => {
      slow.textContent = is ? 'The server is away. This page tries again by itself; keep it open.' : '';
    },
  };
}

/** Asks for the server's state again and again: oftener while a training runs, not at all while nobody looks. */
function makePolling(status, take) {
  let timer = null;
  let rounds = 0;
  let active = false;
  const look = async () => {
    clearTimeout(timer);
    let wait = POLL_MS;
    try {
      const running = await take(await requestJson('info/', { quiet: true }));
      status.away(false);
      rounds += 1;
      if (running) wait = POLL_TRAINING_MS;
    } catch (error) {
      wait = POLL_AWAY_MS;
      if (error.away) status.away(true);
      else status.fail(error);
    }
    clearTimeout(timer);
    if (active && !document.hidden) timer = setTimeout(look, wait);
  };
  document.addEventListener('visibilitychange', () => active && !document.hidden && look());
  const start = () => {
    if (active) return;
    active = true;
    look();
  };
  const stop = () => {
    active = false;
    clearTimeout(timer);
  };
  return { start, stop, now: look, first: () => rounds === 0 };
}
