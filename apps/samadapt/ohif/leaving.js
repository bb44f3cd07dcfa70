// Nobody loses changes by leaving the page, whichever way OHIF has of leaving it.

import { hasUnsent } from './unsent.js';

const NOTE_MS = 500;

/**
 * The browser itself asks before a page with changes is unloaded. OHIF leaves a series without that (to the study list,
 * by the browser's back button), so that these ways become real ones: the page that they lead to is loaded.
 * @param {function(string): boolean} labelling whether a path is that of the page where labels are drawn
 */
export function askBeforeLeaving(labelling) {
  window.addEventListener('beforeunload', (event) => hasUnsent() && event.preventDefault());
  const push = window.history.pushState.bind(window.history);
  let here = place();
  setInterval(() => {
    here = place();
  }, NOTE_MS);

  const loses = (from, to) => labelling(from) && !labelling(to) && hasUnsent();
  const pathOf = (address) => new URL(address, window.location.href).pathname;

  window.history.pushState = (state, title, address) => {
    // OHIF's router loads a page itself where this fails, as it does in browsers that limit it.
    if (address && loses(window.location.pathname, pathOf(address))) throw new Error('there are changes that were not submitted');
    push(state, title, address);
    here = place();
  };

  const back = (event) => {
    const target = window.location.href;
    if (!loses(pathOf(here.address), window.location.pathname)) return;
    event.stopImmediatePropagation(); // the router would show the other page at once
    push(here.state, '', here.address);
    window.location.assign(target);
  };
  window.addEventListener('popstate', back, true);
}

function place() {
  return { address: window.location.href, state: window.history.state };
}
