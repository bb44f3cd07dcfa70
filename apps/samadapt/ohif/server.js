// The server of this page: requests, and what goes wrong with them in words.

/** Where the server's endpoints begin; this file is served at <base>samadapt/ohif/server.js. */
export const BASE = new URL('../../', import.meta.url);

const SLOW_MS = 4000;

/** A refusal or a failure, with what to do about it. */
export class ServerError extends Error {
  constructor(what, remedy = '', status = 0, where = '') {
    super([what, remedy].filter(Boolean).join(' — '));
    this.status = status;
    this.where = where;
  }

  get away() {
    return this.status === 0;
  }
}

/** Told (true) when an answer takes long, and (false) when it has come. */
let onSlow = () => {};
export function whenSlow(listener) {
  onSlow = listener;
}

/**
 * @param {string} path below BASE
 * @param {Object} options `method`; `json`: body to send; `form`: FormData to send; `quiet`: nobody waits for this.
 * @returns {Promise<Response>} a response that is fine
 * @throws {ServerError}
 */
export async function request(path, { method = 'GET', json, form, quiet = false } = {}) {
  const headers = json === undefined ? {} : { 'Content-Type': 'application/json' };
  const body = json === undefined ? form : JSON.stringify(json);
  const slow = quiet ? 0 : setTimeout(() => onSlow(true), SLOW_MS);
  let response;
  try {
    response = await fetch(new URL(path, BASE), { method, headers, body });
  } catch {
    throw new ServerError('the server is away', 'start it again, or wait; nothing in this page is lost');
  } finally {
    clearTimeout(slow);
    if (!quiet) onSlow(false);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The same, decoded. */
export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** What a refusal says: `{what, where, remedy}` of the app, `{detail}` of the host, or the bare status. */
async function refusal(response) {
  const body = await response.json().catch(() => ({}));
  const detail = typeof body.detail === 'string' ? body.detail : body.detail && JSON.stringify(body.detail);
  const where = body.where ? ` (${body.where})` : '';
  const what = body.what ? `${body.what}${where}` : detail || `the server answers ${response.status}`;
  return new ServerError(what, body.remedy || '', response.status, body.where || '');
}
