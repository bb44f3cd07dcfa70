// Model versions: what each is worth, which one answers, and the way back.

import { button, element, section } from './dom.js';
import { requestJson } from './server.js';

/** @param {{say: function, fail: function}} status */
export function modelsSection(status) {
  const list = element('tbody');
  const change = async (path, what) => {
    const now = await requestJson(`samadapt/models/${path}`, { method: 'POST' });
    status.say(`${what}: ${now.version} answers from now on.`);
    await refresh();
  };
  const guarded = (path, what) => change(path, what).catch(status.fail);
  const refresh = async () => {
    const { versions } = await requestJson('samadapt/models', { quiet: true });
    list.replaceChildren(...versions.reverse().map((version) => row(version, guarded)));
  };
  const table = element('table', {}, element('caption', { textContent: 'Versions, the newest first' }), list);
  const node = section('Models', button('Roll back', () => guarded('rollback', 'Rolled back')), table);
  return { node, refresh };
}

function row(version, change) {
  const dice = version.dice ? `${version.dice.mean.toFixed(2)} ${version.measured}` : 'not measured';
  const promote = button('Use', () => change(`${version.version}/promote`, 'Chosen'), {
    'aria-label': `Put ${version.version} in service`,
  });
  return element(
    'tr',
    { title: version.reason },
    element('th', { scope: 'row', textContent: version.version }),
    element('td', { textContent: `${version.cases} ${version.cases === 1 ? 'case' : 'cases'}, ${dice}` }),
    element('td', {}, version.in_service ? 'in service' : promote)
  );
}
