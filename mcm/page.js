for (const figure of document.querySelectorAll("figure.table")) {
  const table = figure.querySelector("table"), [head, ...rows] = table.rows;
  const text = (row, column) => row.cells[column].textContent;
  [...head.cells].forEach((th, column) => th.firstChild.onclick = () => {
    const down = th.ariaSort !== "descending";
    const number = row => Number(text(row, column).split(" ")[0]);
    for (const other of head.cells) other.ariaSort = null;
    th.ariaSort = down ? "descending" : "ascending";
    rows.sort((a, b) => {
      const x = number(a), y = number(b);  // NaN for a text, which comes last
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y) || text(a, column).localeCompare(text(b, column));
      return down ? y - x : x - y;
    });
    table.tBodies[0].append(...rows);
  });
  const copy = figure.querySelector("button.copy");
  copy.onclick = async () => {
    const lines = [...table.rows].map(row => [...row.cells].map(cell => cell.textContent).join("\t"));
    getSelection().selectAllChildren(table);  // without the clipboard, Ctrl+C copies the selection
    await navigator.clipboard.writeText(lines.join("\n"));
    copy.textContent = "copied";
  };
}
