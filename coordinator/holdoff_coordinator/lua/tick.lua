-- Hears many waiters of one replica at once and says what each waits for.
-- ARGV 7.. token id, request hash, time since the waiter was heard in µs; the
--         waiters of one token stand together
-- Answers one {token id, lease id or '', lease, {hash, standing}…} a token; a
-- waiter that the store does not know as waiting has an empty standing.
-- A token that is damaged is left out.
local groups, id = {}, nil
local function hear_one(hash, age)
  local request = load(request_key(hash))
  if request.state == 'waiting' then hear(hash, request, age) end
end
for i = 7, #ARGV, 3 do
  spare('requests/' .. ARGV[i + 1], hear_one, ARGV[i + 1], number(ARGV[i + 2]))
end

local function look(first)
  local token, lease = settle(id)
  local lease_id = token and token.lease or ''
  local queue = queue_of(id, token and obstacle(token, lease) == '', token and token.custody_us)
  local group = {id, lease_id, lease_id ~= '' and flat_lease(id, lease_id) or {}}
  for i = first, #ARGV, 3 do
    if ARGV[i] ~= id then break end
    local hash = ARGV[i + 1]
    local waiting = token and redis.call('HGET', request_key(hash), 'state') == 'waiting'
    group[#group + 1] = {hash, waiting and standing(id, token, lease, queue, hash) or {}}
  end
  groups[#groups + 1] = group
end

for i = 7, #ARGV, 3 do
  if ARGV[i] ~= id then
    id = ARGV[i]
    spare('tokens/' .. id, look, i)
  end
end
return reply('OK', groups)
