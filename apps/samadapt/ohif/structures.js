// Which structure is drawn: the list, new ones, and those that were a mistake.

import { button, element, field } from './dom.js';
import { sameName } from './names.js';
import * as viewer from './viewer.js';

/** @param {{say: function, fail: function}} status */
export function structureChoice(status) {
  const select = element('select');
  const name = element('input', { type: 'text', placeholder: 'name', maxLength: 64 });
  let stored = [];
  select.addEventListener('change', () => viewer.setActiveStructure(Number(select.value)));
  const add = () => {
    status.say(added(name.value.trim()));
    name.value = '';
    refresh();
  };
  const remove = () => {
    status.say(removed(Number(select.value), stored));
    refresh();
  };
  name.addEventListener('keydown', (event) => {
    if (event.key === 'Enter') attempt(add, status);
  });
  const refresh = () => refreshStructures(select);
  const node = element(
    'div',
    {},
    element(
      'div',
      { className: 'samadapt-add' },
      field('Structure', select),
      button('Remove', async () => attempt(remove, status), { title: 'Take a structure that was added by mistake out of the list' })
    ),
    element('div', { className: 'samadapt-add' }, field('New', name), button('Add', async () => attempt(add, status)))
  );
  /** Structures that labels and models have: these stay. */
  const keep = (names) => {
    stored = names;
  };
  return { node, refresh, keep, value: () => Number(select.value) };
}

function attempt(action, status) {
  try {
    action();
  } catch (error) {
    status.fail(error);
  }
}

/** @returns {string} what was done */
function added(wanted) {
  if (!wanted) throw new Error('the new structure needs a name');
  const there = viewer.structureNamed(wanted);
  const value = there ?? viewer.addStructure(wanted);
  viewer.setActiveStructure(value);
  if (there === null) return `Structure “${wanted}” is chosen.`;
  return `There is “${viewer.structures().get(there)}” already; it is chosen.`;
}

/** @returns {string} what was done */
function removed(value, stored) {
  const name = viewer.structures().get(value);
  if (!name) throw new Error('there is no structure to remove');
  if (stored.some((known) => sameName(known) === sameName(name))) {
    throw new Error(`“${name}” stays: stored labels, the model or the server’s settings have it`);
  }
  if (viewer.voxels().includes(value)) throw new Error(`“${name}” is drawn in this series; erase it first`);
  viewer.removeStructure(value);
  return `“${name}” is removed.`;
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
