// Names of structures and people, and times, as people read and compare them.

import { clientId } from './client.js';

/** The form in which names are compared: case, surplus white space and the form of accents do not count. */
export function sameName(name) {
  return name.normalize('NFC').trim().replace(/\s+/g, ' ').toUpperCase().toLowerCase();
}

/** Who made a label. @param {{author: ?string, client_id: ?string, source: ?string}} label */
export function maker({ author, client_id: client, source }) {
  if (author) return author;
  if (client === clientId()) return 'you';
  if (source) return `another program (${source})`;
  return client && !client.startsWith('ohif-') ? client : 'somebody without a name';
}

/** @param {number} seconds since the epoch */
export function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString([], { dateStyle: 'medium', timeStyle: 'medium' });
}
