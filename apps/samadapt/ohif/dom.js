// Elements are made here and nowhere else. Text is always set as text, so that nothing a server says can become markup.

/**
 * @param {string} tag
 * @param {Object} properties DOM properties; `aria-*`, `data-*`, `for` and `role` become attributes.
 * @param {...(Node|string)} children
 */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (/^(aria-|data-|role$|for$)/.test(name)) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

/** A real button; `action` may be asynchronous, and the button cannot be pressed again before it has ended. */
export function button(text, action, properties = {}) {
  const made = element('button', { type: 'button', textContent: text, ...properties });
  made.addEventListener('click', async () => {
    if (made.getAttribute('aria-disabled') === 'true') return;
    made.setAttribute('aria-disabled', 'true'); // unlike `disabled`, this keeps the focus where it is
    try {
      await action(made);
    } finally {
      made.removeAttribute('aria-disabled');
    }
  });
  return made;
}

let fields = 0;

/** A label in front of its input, select or progress bar. */
export function field(text, input) {
  input.id = input.id || `samadapt-field-${++fields}`;
  return element('div', { className: 'samadapt-field' }, element('label', { for: input.id, textContent: text }), input);
}

/** A part of the panel that can be folded. */
export function section(title, ...children) {
  return element('details', { open: true }, element('summary', { textContent: title }), ...children);
}

/** Replace the options of a select and keep what was chosen, if it is still there. */
export function setOptions(select, values, chosen = select.value) {
  const present = [...select.options].map((option) => option.value);
  if (present.join('\n') !== values.join('\n')) {
    select.replaceChildren(...values.map((value) => element('option', { value, textContent: value })));
  }
  if (values.includes(chosen)) select.value = chosen;
}

/** Words as a sentence begins. */
export function capital(words) {
  return words.charAt(0).toUpperCase() + words.slice(1);
}
