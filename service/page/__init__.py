"""The page at `GET /`: HTML, style and JavaScript modules as browsers read them; no build step, nothing from elsewhere.

Served by service/routes/page.py. `main.js` starts the parts: `try_image.js` and `try_sentences.js` send requests,
`live.js` reads /metrics, `kernels.js` shows profiles with `roofline.js` and `plan_table.js`. All requests go through
`api.js`, which knows the API key and says in words what went wrong.
"""
