// Training: start and stop it, watch it, and what it has come to.

import { capital, element, field, section, setOptions } from './dom.js';
import { requestJson } from './server.js';

const RECIPE = 'samadapt-recipe';

/** @param {{say: function, fail: function}} status @param {function} refresh asks the server for its state now */
export function trainingSection(status, refresh) {
  const view = makeView();
  let running = false;
  let trainer = '';
  let summaries = {};
  const describe = () => {
    view.summary.textContent = capital(summaries[view.recipe.value]);
  };
  view.recipe.addEventListener('change', () => {
    sessionStorage.setItem(RECIPE, view.recipe.value);
    describe();
  });
  const start = async () => {
    status.say('The training starts …');
    await requestJson('train/', { method: 'POST', json: trainer ? { [trainer]: { recipe: view.recipe.value } } : {} });
  };
  const stop = async () => {
    status.say('The training stops …');
    await requestJson('train/', { method: 'DELETE' });
    status.say('The training has been stopped; the next one goes on from there.');
  };
  const change = () => (running ? stop() : start()).catch(status.fail).then(refresh);
  view.start.addEventListener('click', change);
  view.pause.addEventListener('change', () => pause(view.pause.checked).catch(status.fail).then(refresh));

  const update = (info) => {
    const stats = Object.values(info.train_stats)[0] || {};
    const before = running;
    running = stats.state === 'running';
    view.start.textContent = running ? 'Stop training' : 'Update model';
    showProgress(view, stats, running);
    showAutomatic(view, info.auto_train);
    [trainer] = Object.keys(info.trainers);
    summaries = info.trainers[trainer].recipes; // the server's own comes first
    setOptions(view.recipe, Object.keys(summaries), sessionStorage.getItem(RECIPE) || Object.keys(summaries)[0]);
    describe();
    showAhead(view.ahead, info.embedded_ahead);
    if (before && !running) sayEnd(status, stats);
    return { running, ended: before && !running };
  };
  return { node: view.node, update };
}

function makeView() {
  const bar = element('progress', { max: 1, value: 0 });
  const view = {
    start: element('button', { type: 'button', textContent: 'Update model' }),
    bar,
    recipe: element('select'),
    summary: element('p', { className: 'samadapt-recipe' }),
    progress: element('p', { className: 'samadapt-progress' }),
    dice: element('p', { className: 'samadapt-dice' }),
    refused: element('p', { className: 'samadapt-refused' }),
    pause: element('input', { type: 'checkbox' }),
    automatic: element('p'),
    ahead: element('p', { className: 'samadapt-ahead' }),
  };
  view.pauseField = field('Pause these trainings', view.pause);
  view.node = section(
    'Training',
    field('Method', view.recipe),
    view.summary,
    view.start,
    field('Progress', bar),
    view.progress,
    view.dice,
    view.refused,
    view.automatic,
    view.pauseField,
    view.ahead
  );
  return view;
}

function showProgress(view, stats, running) {
  view.bar.value = running || stats.state === 'done' ? (stats.epoch || 0) / (stats.total_epochs || 1) : 0;
  const loss = stats.train?.metrics?.loss;
  const message = stats.refused ? '' : stats.message; // the reason of a refusal stands below
  view.progress.textContent = [message, running && loss ? `loss ${loss.toFixed(3)}` : ''].filter(Boolean).join(', ');
  view.dice.textContent = stats.best_metric ? `Held-out Dice: ${stats.best_metric.toFixed(2)}` : '';
  view.refused.textContent = stats.refused ? `Not put in service: ${reasonOf(stats.refused)}` : '';
}

function reasonOf(refused) {
  return typeof refused === 'string' ? refused : refused.reason || JSON.stringify(refused);
}

function showAutomatic(view, state) {
  const automatic = state && state.every !== null;
  view.pauseField.hidden = !automatic;
  view.automatic.textContent = automatic
    ? `A training starts by itself after ${state.every} new labels (${state.new_labels} so far).`
    : '';
  if (automatic) view.pause.checked = state.paused;
}

function showAhead(node, ahead) {
  const slices = ahead.image ? `; slice ${ahead.slices_done} of ${ahead.slices} of the next` : '';
  node.textContent = ahead.images ? `Prepared ahead: ${ahead.images_done} of ${ahead.images} images${slices}.` : '';
}

function sayEnd(status, stats) {
  const service = stats.in_service ? ` In service: ${stats.in_service}.` : '';
  status.say(`The training has ended: ${stats.message}.${service}`);
}

function pause(paused) {
  return requestJson('samadapt/auto_train', { method: 'POST', json: { paused } });
}
