-- Hears many waiters of one replica at once and says what each waits for.
-- ARGV 7.. token id, request hash, time since the waiter was heard in µs; the
--         waiters of one token stand together
-- Answers one {token id, lease id or '', lease, {hash, standing}…} a token; a
-- waiter that the store does not know as waiting has an empty standing.
local groups, group, id, token, lease, queue = {}, nil, nil, nil, nil, nil
for i = 7, #ARGV, 3 do
  local hash, request = ARGV[i + 1], load(request_key(ARGV[i + 1]))
  if request.state == 'waiting' then hear(hash, request, number(ARGV[i + 2])) end
end
for i = 7, #ARGV, 3 do
  if ARGV[i] ~= id then
    id = ARGV[i]
    token, lease = settle(id)
    local lease_id = token and token.lease or ''
    queue = queue_of(id, token and obstacle(token, lease) == '')
    group = {id, lease_id, lease_id ~= '' and flat_lease(id, lease_id) or {}}
    groups[#groups + 1] = group
  end
  local hash = ARGV[i + 1]
  local waiting = token and redis.call('HGET', request_key(hash), 'state') == 'waiting'
  group[#group + 1] = {hash, waiting and standing(token, lease, queue, hash) or {}}
end
return reply('OK', groups)
