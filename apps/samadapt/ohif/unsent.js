// Changes that were not submitted, on which stored label they stand, and which slices that label covers.

import { editedSlices, mark, returnTo, startFrom, takeModelMask } from './edits.js';
import * as viewer from './viewer.js';

const series = () => viewer.shownSeries()?.SeriesInstanceUID;

/** What the page's mask stands on, by series: a stored version's name, and its labelled slices ('all', or k from 0). */
const bases = new Map();

/** The mask whose changes are counted. */
let counted = null;

/** A person's own mask while they look at another label. */
let aside = null;

/** Whether there are changes that nobody has submitted. */
export function hasUnsent() {
  return Boolean(viewer.maskVolume()) && (aside !== null || edited().length > 0);
}

/** @returns {number[]} every k that was changed by hand since the stored label or the model's mask */
export function edited() {
  return editedSlices(viewer.voxels(), viewer.maskVolume().dimensions);
}

/** The version that a submission replaces knowingly; null: none. */
export function base() {
  return bases.get(series())?.version ?? null;
}

/** Labelled slices of a submission of `now`, with those that the stored label covers already. */
export function together(now) {
  const before = bases.get(series())?.slices;
  if (before === 'all' || now === 'all') return 'all';
  return [...new Set([...(before || []), ...now])].sort((a, b) => a - b);
}

/** The page shows this stored label now. */
export function standOn(version, slices, mask) {
  bases.set(series(), { version, slices });
  startFrom(mask);
  aside = null;
}

/** A model's mask has taken the place of everything. */
export function standOnModel(mask) {
  forgetCovered();
  startFrom(mask);
}

/** None of the stored label's slices is in the mask any more as somebody has labelled it. */
function forgetCovered() {
  if (bases.has(series())) bases.get(series()).slices = [];
}

/** A model's mask has come by the bundled panel: what was changed by hand before still counts as that. */
export function mindModel() {
  forgetCovered();
  takeModelMask(viewer.voxels(), viewer.maskVolume().dimensions);
}

/** A series is shown: count changes anew where the page has a new mask for it. */
export function begin() {
  if (!viewer.maskFits() || viewer.maskVolume() === counted) return;
  counted = viewer.maskVolume();
  startFrom(new Uint8Array(0));
  bases.delete(series());
  aside = null;
}

/** Keep the mask while another one is looked at. */
export function layAside() {
  aside = { mask: viewer.voxels(), edits: mark() };
}

/** The mask that was laid aside is back. */
export function takeBack() {
  viewer.setVoxels(aside.mask);
  returnTo(aside.edits);
  aside = null;
}

/** Whether another label is looked at. */
export function isLooking() {
  return aside !== null;
}
