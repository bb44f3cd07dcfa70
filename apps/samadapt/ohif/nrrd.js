// Reads the raw NRRD that the server sends on request: uint8, uncompressed, three axes.

/**
 * @param {ArrayBuffer} buffer
 * @returns {{sizes: number[], voxels: Uint8Array, names: Map<number, string>}} voxels with i fastest, then j, then k;
 *   names of their values, as far as the file says them
 */
export function readNrrd(buffer) {
  const bytes = new Uint8Array(buffer);
  const end = endOfHeader(bytes);
  const fields = readFields(new TextDecoder('ascii').decode(bytes.subarray(0, end)));
  const sizes = (fields.sizes || '').split(/\s+/).map(Number);
  const voxels = bytes.slice(end);
  if (fields.encoding !== 'raw' || sizes.reduce((a, b) => a * b, 1) !== voxels.length) {
    throw new Error(`the mask is no raw NRRD of bytes: ${fields.encoding}, ${sizes}, ${voxels.length} bytes`);
  }
  const names = Object.entries(JSON.parse(fields.label_names || '{}')).map(([value, name]) => [Number(value), name]);
  return { sizes, voxels, names: new Map(names) };
}

function endOfHeader(bytes) {
  for (let n = 1; n < bytes.length; n++) {
    if (bytes[n] === 10 && (bytes[n - 1] === 10 || (bytes[n - 1] === 13 && bytes[n - 2] === 10))) return n + 1;
  }
  throw new Error('the mask has no NRRD header');
}

function readFields(header) {
  const fields = {};
  for (const line of header.split(/\r?\n/).slice(1)) {
    const match = /^([^:#]+):=?\s*(.*)$/.exec(line);
    if (match) fields[match[1].trim()] = match[2].trim();
  }
  return fields;
}
