// What a mask is probably worth: Dice by structure, and the slices in which the model is least sure.

import { button, element } from './dom.js';
import { jumpToSlice, sliceNumber } from './viewer.js';

/**
 * @param {?{dice: Object, error: Object, mean: ?number, not_found: string[], unsure_slices: number[]}} quality of the
 *   reply; null: nothing known
 */
export function showQuality(node, quality) {
  node.replaceChildren();
  if (!quality) return;
  const figures = Object.entries(quality.dice).map(([name, dice]) => [
    name,
    `${dice.toFixed(2)} ± ${quality.error[name].toFixed(2)}`,
  ]);
  const rows = [...figures, ...quality.not_found.map((name) => [name, 'not found'])].map(([name, worth]) =>
    element('tr', {}, element('th', { scope: 'row', textContent: name }), element('td', { textContent: worth }))
  );
  if (rows.length) node.append(element('table', {}, element('caption', { textContent: 'Expected Dice' }), ...rows));
  if (quality.unsure_slices.length) node.append(sliceButtons('Least sure', quality.unsure_slices));
}

/** A row of buttons that jump to slices; they bear the numbers that OHIF shows. */
export function sliceButtons(title, slices) {
  const jumps = slices.map((k) =>
    button(String(sliceNumber(k)), async () => jumpToSlice(k), { 'aria-label': `Go to slice ${sliceNumber(k)}` })
  );
  return element('div', { className: 'samadapt-row', role: 'group', 'aria-label': title }, `${title}: `, ...jumps);
}

/** Slices as people write them: "3–5, 9", by the numbers that OHIF shows. @param {number[]} slices k from 0 */
export function slicesInWords(slices) {
  const runs = [];
  for (const number of slices.map(sliceNumber).sort((a, b) => a - b)) {
    const last = runs[runs.length - 1];
    if (last && last[1] === number - 1) last[1] = number;
    else runs.push([number, number]);
  }
  return runs.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(', ') || 'none';
}
