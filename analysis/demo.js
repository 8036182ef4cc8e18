// Sends an image, dropped, pasted, chosen or an example, to this page's own server and shows its answer.
const at = id => document.getElementById(id), input = document.querySelector('#drop input');
let asked = 0;

async function ask(name, query, body) {
  const mine = ++asked;
  at('error').textContent = '';
  document.body.setAttribute('aria-busy', 'true');
  try {
    if (body && body.size > at('largest').value) throw Error('This file is larger than the server accepts.');
    const reply = await fetch('/answer' + query, { method: 'POST', body }).catch(() => {
      throw Error('The server does not answer: was it stopped?');
    });
    const found = await reply.json();
    if (mine === asked) reply.ok ? show(name, found) : fail(found.error);
  } catch (error) {
    if (mine === asked) fail(error.message);
  }
  if (mine === asked) document.body.setAttribute('aria-busy', 'false');
}

function fail(reason) {
  at('error').textContent = reason;
  at('answer').hidden = true;
}

function show(name, found) {
  document.querySelector('#answer h2').textContent = name + (found.truth && `: ${found.truth}`);
  at('seen').src = found.seen;
  at('size').textContent = found.size;
  at('classes').replaceChildren(...found.classes.map((one, k) => row(one, k, found)));
  choose(found.classes[0], found.evidence);
  at('answer').hidden = false;
}

function row(one, k, found) {
  const label = document.createElement('label'), radio = document.createElement('input');
  const name = document.createElement('span'), percent = document.createElement('output');
  const bar = document.createElement('i'), filled = document.createElement('b');
  Object.assign(radio, { type: 'radio', name: 'class', checked: k === 0 });
  radio.addEventListener('change', () => choose(one, found.evidence));
  name.textContent = one.name + (one.name === found.truth ? ' ✓' : '');
  percent.textContent = `${one.percent.toFixed(1)} %`;
  filled.style.width = `${one.percent}%`;
  bar.append(filled);
  label.append(radio, name, percent, bar);
  return label;
}

function choose(one, evidence) {
  at('map').src = one.map || at('seen').src;
  at('map').alt = `The image in grey, with the evidence for ${one.name} in bright colours`;
  at('evidence').textContent = one.map ? `Bright: evidence for ${one.name}. ${evidence}` : evidence;
}

const first = files => files && files[0] && ask(files[0].name || 'Pasted image', '', files[0]);
input.addEventListener('change', () => { first(input.files); input.value = ''; });
addEventListener('paste', event => first(event.clipboardData.files));
addEventListener('dragover', event => { event.preventDefault(); document.body.classList.add('over'); });
addEventListener('dragleave', event => event.relatedTarget || document.body.classList.remove('over'));
addEventListener('drop', event => {
  event.preventDefault();
  document.body.classList.remove('over');
  first(event.dataTransfer.files) || fail('Drop an image file.');
});
for (const button of document.querySelectorAll('[data-example]'))
  button.addEventListener('click', () => ask('Example', `?example=${button.dataset.example}`));
