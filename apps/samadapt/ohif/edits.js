// Which slices somebody has changed since the label was submitted last, or since a model put its mask there.

let baseline = null;

/** From here on, changes count from these voxels. */
export function startFrom(voxels) {
  baseline = voxels;
}

/**
 * @param {Uint8Array} voxels the mask of now
 * @param {number[]} dimensions of the mask, [I, J, K]
 * @returns {number[]} every k in which a voxel differs from the baseline; without one, every k that is not empty
 */
export function editedSlices(voxels, dimensions) {
  const size = dimensions[0] * dimensions[1];
  const before = baseline?.length === voxels.length ? baseline : new Uint8Array(voxels.length);
  const edited = [];
  for (let k = 0; k < dimensions[2]; k++) {
    for (let n = k * size; n < (k + 1) * size; n++) {
      if (voxels[n] !== before[n]) {
        edited.push(k);
        break;
      }
    }
  }
  return edited;
}
