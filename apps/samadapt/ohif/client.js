// Who this is: one name for each tab that somebody works in, for the server, and a person's own, for other people.

const KEY = 'samadapt-client';
const AUTHOR = 'samadapt-author';

export function clientId() {
  let id = sessionStorage.getItem(KEY);
  if (!id) {
    id = `ohif-${crypto.getRandomValues(new Uint32Array(2)).join('-')}`;
    sessionStorage.setItem(KEY, id);
  }
  return id;
}

/** The name that the person has given, '' if none; the browser keeps it. */
export function author() {
  return localStorage.getItem(AUTHOR) || '';
}

export function setAuthor(name) {
  localStorage.setItem(AUTHOR, name.trim());
}

/** Who this is, as requests that change labels say it. */
export function person() {
  return { client_id: clientId(), ...(author() ? { author: author() } : {}) };
}
