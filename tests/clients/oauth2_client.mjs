// What a job does with @badgateway/oauth2-client. Prints one JSON document of what it saw.
//
//   EXACT_URL=https://127.0.0.1:8443 NODE_EXTRA_CA_CERTS=ca.pem node oauth2_client.mjs SEED
//
// SEED is one of the grants that URL/_simulator/seed returns.
import { OAuth2Client, OAuth2Fetch } from '@badgateway/oauth2-client'

const exact = process.env.EXACT_URL
const seed = JSON.parse(process.argv[2])
const redirectUri = 'https://example.com/callback'

const client = new OAuth2Client({
  clientId: seed.client_id,
  clientSecret: seed.client_secret,
  authorizationEndpoint: `${exact}/api/oauth2/auth`,
  tokenEndpoint: `${exact}/api/oauth2/token`,
})

// The browser of a user is sent to a page, and allows the app there.
async function logOn() {
  const state = 'a-state'
  const page = await client.authorizationCode.getAuthorizeUri({ redirectUri, state })
  const answer = await fetch(`${page}&user=${seed.user}`, { redirect: 'manual' })
  const address = answer.headers.get('location')
  return client.authorizationCode.getTokenFromCodeRedirect(address, { redirectUri, state })
}

// One run of the job; `stored` is the token that the run before it has kept.
function run(stored) {
  const kept = []
  const session = new OAuth2Fetch({
    client,
    scheduleRefresh: false, // it would refresh a minute before the end of the token, which is too early
    getNewToken: () => null,
    getStoredToken: () => stored,
    storeToken: (token) => kept.push(token),
  })
  const call = async (method, path, document) => {
    const url = path.startsWith('https:') ? path : `${exact}/api/v1/${path}`
    const headers = { Accept: 'application/json', 'Content-Type': 'application/json' }
    const body = document && JSON.stringify(document)
    const response = await session.fetch(url, { method, headers, body })
    const text = await response.text()
    return { status: response.status, d: text && JSON.parse(text).d }
  }
  return { call, kept }
}

const token = await logOn()
const { call } = run(token)
const [me] = (await call('GET', 'current/Me')).d.results
const accounts = `${me.CurrentDivision}/crm/Accounts`
const pages = []
for (let url = accounts; url; ) {
  const { d } = await call('GET', url)
  pages.push(d.results.length)
  url = d.__next
}
const created = await call('POST', accounts, { Code: '7001', Name: 'New' })
const one = `${accounts}(guid'${created.d.ID}')`
const changed = await call('PUT', one, { Name: 'Changed' })
const read = await call('GET', `${accounts}?$filter=ID eq guid'${created.d.ID}'&$select=Name`)
const deleted = await call('DELETE', one)

await fetch(`${exact}/_simulator/clock`, {
  method: 'POST',
  body: JSON.stringify({ advance_seconds: 605 }),
})
const later = run({ ...token, expiresAt: token.expiresAt - 605_000 })
const after = await later.call('GET', 'current/Me')

console.log(
  JSON.stringify({
    pages,
    names: read.d.results.map((account) => account.Name),
    statuses: [created, changed, read, deleted, after].map((answer) => answer.status),
    refreshes: later.kept.length,
  }),
)
