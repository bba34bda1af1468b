// The models of /v1/models as choices.

/** [value, text] of every version that is ready and has this task, of each model the one first that is served where a
 * request names none; a model's name alone where it has one version. */
export function choices(models, task) {
  const ready = models.filter((model) => model.state === "READY" && model.task === task);
  const order = [...new Set(ready.map((model) => model.id))];
  ready.sort((a, b) => order.indexOf(a.id) - order.indexOf(b.id) || b.version - a.version);
  return ready.map((model) => {
    const alone = ready.filter((other) => other.id === model.id).length === 1;
    return [pathOf(model), alone ? model.id : `${model.id}, version ${model.version}`];
  });
}

/** What a choice means: the path of the model under /v1, and the query that names its version. */
export function chosen(value) {
  const [name, version] = JSON.parse(value);
  return { path: `/v1/models/${encodeURIComponent(name)}`, query: `version=${encodeURIComponent(version)}` };
}

function pathOf(model) {
  return JSON.stringify([model.id, model.version]);
}
