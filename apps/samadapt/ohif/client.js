// Who this is, as far as the server needs to know: one name for each tab that somebody works in.

const KEY = 'samadapt-client';

export function clientId() {
  let id = sessionStorage.getItem(KEY);
  if (!id) {
    id = `ohif-${crypto.getRandomValues(new Uint32Array(2)).join('-')}`;
    sessionStorage.setItem(KEY, id);
  }
  return id;
}
