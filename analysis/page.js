// Pointing at a chart shows the values of the nearest epoch or step, and a line there.
for (const plot of document.querySelectorAll('.plot')) {
  const data = JSON.parse(plot.dataset.chart), cursor = plot.querySelector('i');
  const values = plot.nextElementSibling, hint = values.textContent;
  plot.addEventListener('pointermove', event => {
    const box = plot.getBoundingClientRect(), percent = 100 * (event.clientX - box.left) / box.width;
    let nearest = 0;
    data.x.forEach((x, k) => { if (Math.abs(x - percent) < Math.abs(data.x[nearest] - percent)) nearest = k; });
    cursor.style.left = data.x[nearest] + '%';
    cursor.hidden = false;
    const known = data.series.filter(line => line.text[nearest] !== null);
    values.textContent = `${data.points[nearest]}: ` + known.map(line => `${line.name} ${line.text[nearest]}`).join(' | ');
  });
  plot.addEventListener('pointerleave', () => { cursor.hidden = true; values.textContent = hint; });
}
