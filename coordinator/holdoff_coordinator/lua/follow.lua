-- Says what holders must do.
-- ARGV 7.. token id, lease id, hash of its secret
-- Answers one {token id, lease id, status, …} a lease. After LEASE_OVER: its state,
-- and why it was broken; after LEASE_BROKEN: why. After OK: '' or the earliest start
-- in µs, '1' if it may go on then without being told, the places that it named, and
-- the back-offs that it is subject to. DAMAGED: its record, or that of its token.
local function follow(id, lease_id, secret_hash)
  local lease = load(lease_key(id, lease_id))
  if number(lease.expires_us) <= sure and not lease.ended_us then
    settle(id)
    lease = load(lease_key(id, lease_id))
  end
  local answer = {id, lease_id}
  if not lease.state then
    answer[3] = 'LEASE_NOT_FOUND'
  elseif lease.secret_hash ~= secret_hash then
    answer[3] = 'WRONG_SECRET'
  elseif lease.state ~= 'ACTIVE' and lease.state ~= 'OFFERED' then
    answer[3], answer[4], answer[5] = 'LEASE_OVER', lease.state, lease.break_reason or ''
  elseif lease.break_reason then
    answer[3], answer[4] = 'LEASE_BROKEN', lease.break_reason
  else
    local subject, named = back_offs_of_holder(id, lease_id, lease)
    local wait = lease.state == 'ACTIVE' and wait_of(lease.request, subject, true)
    if wait then
      for _, one in ipairs(subject) do
        if one.probe == lease.request then drop_probe(one) end
      end
    elseif lease.state == 'ACTIVE' then
      go(lease.request, subject)
    end
    answer[3], answer[4], answer[5] = 'OK', wait and us(wait.start) or '', wait and wait.timed and '1' or '0'
    answer[6] = named or ''
    for _, one in ipairs(subject) do answer[#answer + 1] = shown_back_off(one) end
  end
  return answer
end

local answers = {}
for i = 7, #ARGV, 3 do
  local id, lease_id = ARGV[i], ARGV[i + 1]
  local answer = spare('tokens/' .. id, follow, id, lease_id, ARGV[i + 2])
  answers[#answers + 1] = answer or {id, lease_id, 'DAMAGED'}
end
return reply('OK', answers)
