// Masks that the server sends, brought into the terms of the page: its grid and its numbers of structures.

import * as viewer from './viewer.js';

/**
 * Refuse a mask that is not the shown series'.
 * @param {number[]} sizes of the mask
 * @param {string} series it was asked for
 */
export function checkFits(sizes, series) {
  if (viewer.shownSeries().SeriesInstanceUID !== series) {
    throw new Error('another series is shown now; its mask is left alone');
  }
  if (!viewer.maskFits()) throw new Error('the page’s mask belongs to another series; press “Label this series”');
  const shown = viewer.maskVolume().dimensions;
  if (sizes.join() !== [...shown].join()) throw new Error(`the mask has ${sizes} voxels, the series ${shown}`);
}

/**
 * Put a mask of named values in the place of the page's. Structures that the page does not have are added.
 * @param {Uint8Array} voxels i fastest, then j, then k
 * @param {Map<number, string>} names of the values; others get a name that says that they have none
 * @returns {Uint8Array} the mask in the page's values
 */
export function showMask(voxels, names) {
  const table = new Uint8Array(256);
  for (const [value, name] of names) table[value] = viewer.addStructure(name);
  for (const value of new Set(voxels)) {
    if (value && !names.has(value)) table[value] = viewer.addStructure(`unnamed ${value}`);
  }
  const mask = voxels.map((value) => table[value]);
  viewer.setVoxels(mask);
  return mask;
}
