-- All that is done to the store, each call at once. KEYS[1] is the key of meta, whose part before
-- "meta" begins all keys. ARGV: what to do, the id and the server's run that the caller knows, and
-- more for each. The reply begins with "ok", or with "lost", "old", "boot" or "full", which changed
-- nothing.
--
--   meta           HASH  id, n: entries of changes so far, c: the last of them that is a change,
--                        clock: joins, eras: processes of nodes, users, count: memberships
--   changes        STREAM, entry n-0: r, u, d: rooms, users, and + or - with the node, for who is in
--                        or has left, of memberships that have changed; Controllers before deltas write
--                        no d. j, s, g: a Controller has come, has settled changes, is gone
--   controllers    HASH  controller -> "at lease settled"
--   words          HASH  node -> "at run boot": its last SyncNode; run, if the store of then was told all
--   nodes          HASH  node -> memberships
--   n:<node>       HASH  boot, era, floor
--   f:<node>       HASH  slot -> floor
--   d:<node>       HASH  slot -> digest, as "high low"
--   s:<slot>:<node>  SET of user \0 room
--   u:<user>       HASH  room \0 node -> clock
--   r:<room>       HASH  user \0 node -> "era seq clock joined high low" \n name and metadata;
--                        "" -> "created updated users"
--   rooms          SET
--
-- Numbers of reports have 20 digits: they are compared as texts, since they have 64 bits.
local P = string.sub(KEYS[1], 1, -5)
local op, id, run = ARGV[1], ARGV[2], ARGV[3]
local call = redis.call
local META, CHANGES, CONTROLLERS, WORDS, NODES, ROOMS = KEYS[1], P .. 'changes', P .. 'controllers', P .. 'words', P .. 'nodes', P .. 'rooms'
local ZERO = string.rep('0', 20)
local TWO32 = 4294967296
local NODE_MEMORY = 86400000
local MOST_CHANGES = 100000

local time = call('TIME')
local now, ms = time[1], tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function running() return string.match(call('INFO', 'server'), 'run_id:(%x+)') end
local function int(n) return string.format('%.0f', n) end
local function counter(name) return tonumber(call('HGET', META, name) or 0) end

if op == 'open' then
  call('HSETNX', META, 'id', id)
  return {'ok', call('HGET', META, 'id'), running()}
end
if call('HGET', META, 'id') ~= id or running() ~= run then return {'lost'} end

local function append(...)
  local n = call('HINCRBY', META, 'n', 1)
  call('XADD', CHANGES, 'MAXLEN', '~', MOST_CHANGES, int(n) .. '-0', ...)
  return n
end

-- Memberships that have changed, to be told by tell.
local rooms, users, nodes = {}, {}, {}

local function note(sign, user, room, node)
  rooms[#rooms + 1], users[#users + 1], nodes[#nodes + 1] = room, user, sign .. node
end

local function tell()
  if #users > 0 then
    call('HSET', META, 'c', int(append('r', table.concat(rooms, '\0'), 'u', table.concat(users, '\0'), 'd', table.concat(nodes, '\0'))))
  end
end

local function parse(record)
  local era, seq, clock, joined, hi, lo, at = string.match(record, '^(%d+) (%d+) (%d+) (%d+) (%d+) (%d+)\n()')
  return {era = era, seq = seq, clock = tonumber(clock), joined = joined, hi = hi, lo = lo, blob = string.sub(record, at)}
end

local function save(user, room, node, m)
  call('HSET', P .. 'r:' .. room, user .. '\0' .. node,
    table.concat({m.era, m.seq, int(m.clock), m.joined, m.hi, m.lo}, ' ') .. '\n' .. m.blob)
end

local function find(user, room, node)
  local record = call('HGET', P .. 'r:' .. room, user .. '\0' .. node)
  return record and parse(record)
end

-- where lists the nodes of a user in a room.
local function where(user, room)
  local nodes, head = {}, room .. '\0'
  for _, field in ipairs(call('HKEYS', P .. 'u:' .. user)) do
    if string.sub(field, 1, #head) == head then nodes[#nodes + 1] = string.sub(field, #head + 1) end
  end
  return nodes
end

local function head(room)
  local created, updated, users = string.match(call('HGET', P .. 'r:' .. room, '') or '', '^(%d+) (%d+) (%d+)$')
  return created and {created = created, updated = updated, users = tonumber(users)}
end

local function update(room, h)
  call('HSET', P .. 'r:' .. room, '', table.concat({h.created, now, int(h.users)}, ' '))
end

local function touch(room) update(room, head(room)) end

local function shift(node, slot, hi, lo, sign)
  local h, l = string.match(call('HGET', P .. 'd:' .. node, slot) or '0 0', '^(%d+) (%d+)$')
  h, l = tonumber(h) + sign * tonumber(hi), tonumber(l) + sign * tonumber(lo)
  if l >= TWO32 then l, h = l - TWO32, h + 1 elseif l < 0 then l, h = l + TWO32, h - 1 end
  call('HSET', P .. 'd:' .. node, slot, int(h % TWO32) .. ' ' .. int(l))
end

local function add(user, room, node, slot, m)
  local h = head(room) or {created = now, users = 0}
  if #where(user, room) == 0 then h.users = h.users + 1 end
  m.clock, m.joined = call('HINCRBY', META, 'clock', 1), now
  save(user, room, node, m)
  update(room, h)
  call('SADD', ROOMS, room)
  if call('EXISTS', P .. 'u:' .. user) == 0 then call('HINCRBY', META, 'users', 1) end
  call('HSET', P .. 'u:' .. user, room .. '\0' .. node, int(m.clock))
  call('SADD', P .. 's:' .. slot .. ':' .. node, user .. '\0' .. room)
  shift(node, slot, m.hi, m.lo, 1)
  call('HINCRBY', NODES, node, 1)
  call('HINCRBY', META, 'count', 1)
  note('+', user, room, node)
end

local function remove(user, room, node, slot, m)
  local R, U = P .. 'r:' .. room, P .. 'u:' .. user
  call('HDEL', R, user .. '\0' .. node)
  call('HDEL', U, room .. '\0' .. node)
  if call('EXISTS', U) == 0 then call('HINCRBY', META, 'users', -1) end
  if call('HLEN', R) <= 1 then
    call('DEL', R)
    call('SREM', ROOMS, room)
  else
    local h = head(room)
    if #where(user, room) == 0 then h.users = h.users - 1 end
    update(room, h)
  end
  call('SREM', P .. 's:' .. slot .. ':' .. node, user .. '\0' .. room)
  shift(node, slot, m.hi, m.lo, -1)
  if call('HINCRBY', NODES, node, -1) <= 0 then
    call('HDEL', NODES, node)
    call('DEL', P .. 'd:' .. node)
  end
  call('HINCRBY', META, 'count', -1)
  note('-', user, room, node)
end

local function begin(node, boot)
  local era = int(call('HINCRBY', META, 'eras', 1))
  call('HSET', P .. 'n:' .. node, 'boot', boot, 'era', era, 'floor', ZERO)
  call('DEL', P .. 'f:' .. node)
  return {boot = boot, era = era, floor = ZERO}
end

local function remember(node)
  call('PEXPIRE', P .. 'n:' .. node, NODE_MEMORY)
  call('PEXPIRE', P .. 'f:' .. node, NODE_MEMORY)
end

local function known(node)
  local v = call('HMGET', P .. 'n:' .. node, 'boot', 'era', 'floor')
  return {boot = v[1] or '', era = v[2] or '0', floor = v[3] or ZERO}
end

-- reporter is the node that reports, nil when it is another process of it.
local function reporter(node, boot)
  local n = known(node)
  if boot == '' then return n end
  if n.boot == '' then n = begin(node, boot) end
  if n.boot ~= boot then return nil end
  remember(node)
  return n
end

local function floor(node, n, slot)
  local own = call('HGET', P .. 'f:' .. node, slot) or ZERO
  if own > n.floor then return own end
  return n.floor
end

local function raise(node, slot, seq)
  if seq > (call('HGET', P .. 'f:' .. node, slot) or ZERO) then
    call('HSET', P .. 'f:' .. node, slot, seq)
    remember(node)
  end
end

-- info is a room's head and, while they are few, its members.
local function info(room, most)
  local R = P .. 'r:' .. room
  local h = call('HGET', R, '')
  if not h then return {} end
  if call('HLEN', R) - 1 > tonumber(most) then return {h} end
  return {h, call('HGETALL', R)}
end

if op == 'join' then
  local node, boot, seq, user, room, slot, hi, lo, blob, limit, most = unpack(ARGV, 4)
  local n = reporter(node, boot)
  if not n then return {'boot'} end
  local m = find(user, room, node)
  if not m then
    if boot ~= '' and seq <= floor(node, n, slot) then return {'old'} end
    if tonumber(limit) > 0 and #where(user, room) == 0 then
      local h = head(room)
      if h and h.users >= tonumber(limit) then return {'full', counter('c'), info(room, -1)} end
    end
    add(user, room, node, slot, {era = boot ~= '' and n.era or '0', seq = boot ~= '' and seq or ZERO, hi = hi, lo = lo, blob = blob})
  elseif boot == '' or m.era ~= n.era or seq >= m.seq then
    local last = true
    for _, clock in ipairs(call('HVALS', P .. 'u:' .. user)) do
      if tonumber(clock) > m.clock then last = false end
    end
    local changed = not last or m.blob ~= blob
    m.clock, m.blob = call('HINCRBY', META, 'clock', 1), blob
    if boot ~= '' then m.era, m.seq = n.era, seq end
    save(user, room, node, m)
    call('HSET', P .. 'u:' .. user, room .. '\0' .. node, int(m.clock))
    if changed then
      touch(room)
      note('+', user, room, node)
    end
  end
  tell()
  return {'ok', counter('c'), info(room, most)}
end

if op == 'leave' then
  local node, boot, seq, user, room, slot = unpack(ARGV, 4)
  local n = reporter(node, boot)
  if not n then return {'boot'} end
  if boot ~= '' then raise(node, slot, seq) end
  for _, on in ipairs(where(user, room)) do
    if node == '' or on == node then
      local m = find(user, room, on)
      if boot ~= '' and m.era == n.era and m.seq > seq then return {'old'} end
      remove(user, room, on, slot, m)
    end
  end
  tell()
  return {'ok', counter('c'), #users}
end

if op == 'begin' then
  local node, boot, seq = unpack(ARGV, 4)
  local n = known(node)
  local fresh = n.boot ~= boot
  if fresh then n = begin(node, boot) end
  if seq > n.floor then call('HSET', P .. 'n:' .. node, 'floor', seq) end
  remember(node)
  return {'ok', counter('c'), fresh and 1 or 0, n.era, counter('clock')}
end

if op == 'clock' then return {'ok', counter('clock')} end

-- drop ends memberships in slots from the first on, until it has looked at enough. It returns the
-- slot to go on with.
if op == 'drop' then
  local node, slot, untilClock, era, seq, enough = unpack(ARGV, 4)
  local looked = 0
  slot, untilClock, enough = tonumber(slot), tonumber(untilClock), tonumber(enough)
  if call('HEXISTS', NODES, node) == 0 then slot = 1024 end
  while slot < 1024 and looked < enough do
    for _, pair in ipairs(call('SMEMBERS', P .. 's:' .. slot .. ':' .. node)) do
      looked = looked + 1
      local at = string.find(pair, '\0', 1, true)
      local user, room = string.sub(pair, 1, at - 1), string.sub(pair, at + 1)
      local m = find(user, room, node)
      -- era "" is for all of them, whoever has reported them.
      if m.clock <= untilClock and (era == '' or m.era ~= era or m.seq < seq) then
        remove(user, room, node, slot, m)
      end
    end
    slot = slot + 1
  end
  tell()
  return {'ok', counter('c'), slot, #users}
end

-- slot makes the memberships of a slot equal to those listed: user, room, high, low, name and
-- metadata of each.
if op == 'slot' then
  local node, boot, seq, slot = unpack(ARGV, 4, 7)
  local n = reporter(node, boot)
  if not n then return {'boot'} end
  if seq <= floor(node, n, slot) then return {'old'} end
  raise(node, slot, seq)
  local listed = {}
  for i = 8, #ARGV, 5 do listed[ARGV[i] .. '\0' .. ARGV[i + 1]] = i end
  for _, pair in ipairs(call('SMEMBERS', P .. 's:' .. slot .. ':' .. node)) do
    local at, i = string.find(pair, '\0', 1, true), listed[pair]
    local user, room = string.sub(pair, 1, at - 1), string.sub(pair, at + 1)
    local m = find(user, room, node)
    listed[pair] = nil
    if m.era == n.era and m.seq > seq then
      -- A later report has made it.
    elseif not i then
      remove(user, room, node, slot, m)
    else
      local changed = m.blob ~= ARGV[i + 4]
      m.era, m.seq, m.blob = n.era, seq, ARGV[i + 4]
      save(user, room, node, m)
      if changed then
        touch(room)
        note('+', user, room, node)
      end
    end
  end
  for _, i in pairs(listed) do
    add(ARGV[i], ARGV[i + 1], node, slot, {era = n.era, seq = seq, hi = ARGV[i + 2], lo = ARGV[i + 3], blob = ARGV[i + 4]})
  end
  tell()
  return {'ok', counter('c')}
end

if op == 'digests' then
  local node, boot = unpack(ARGV, 4)
  if not reporter(node, boot) then return {'boot'} end
  return {'ok', call('HGETALL', P .. 'd:' .. node)}
end

-- room is a page of a large room, or all of a small one, and the last change that is certainly in it.
if op == 'room' then
  local room, cursor, most, page = unpack(ARGV, 4)
  if cursor == '0' then
    local all = info(room, most)
    if #all ~= 1 then return {'ok', '0', all[1] or '', all[2] or {}, counter('c')} end
  end
  local found = call('HSCAN', P .. 'r:' .. room, cursor, 'COUNT', page)
  return {'ok', found[1], call('HGET', P .. 'r:' .. room, '') or '', found[2], counter('c')}
end

if op == 'users' then
  local out = {'ok'}
  for i = 4, #ARGV do out[#out + 1] = call('HGETALL', P .. 'u:' .. ARGV[i]) end
  return out
end

if op == 'rooms' then
  local found = call('SSCAN', ROOMS, ARGV[4], 'COUNT', ARGV[5])
  local out = {'ok', found[1]}
  for _, room in ipairs(found[2]) do
    out[#out + 1] = room
    out[#out + 1] = call('HGET', P .. 'r:' .. room, '') or ''
  end
  return out
end

if op == 'nodes' then
  local out = {'ok'}
  for _, node in ipairs(call('HKEYS', NODES)) do
    out[#out + 1] = node
    out[#out + 1] = known(node).boot
  end
  return out
end

if op == 'hear' then
  local node, boot, complete = unpack(ARGV, 4)
  call('HSET', WORDS, node, int(ms) .. ' ' .. (complete == '1' and run or '-') .. ' ' .. boot)
  return {'ok'}
end

if op == 'words' then
  local oldest = ms - tonumber(ARGV[4])
  local out, all = {'ok'}, call('HGETALL', WORDS)
  for i = 1, #all, 2 do
    local at, told, boot = string.match(all[i + 1], '^(%d+) ([%x-]+) (.*)$')
    if tonumber(at) < oldest then
      call('HDEL', WORDS, all[i])
    else
      out[#out + 1], out[#out + 2], out[#out + 3], out[#out + 4] = all[i], int(ms - tonumber(at)), told == run and '1' or '0', boot
    end
  end
  return out
end

-- renew says that a Controller lives: that its watchers may trust answers for a lease from now on,
-- and that they know of all changes up to settled.
if op == 'renew' then
  local me, lease, settled, believed = unpack(ARGV, 4)
  local all, others = call('HGETALL', CONTROLLERS), {}
  local here = false
  for i = 1, #all, 2 do
    local at, its, through = string.match(all[i + 1], '^(%d+) (%d+) (%d+)$')
    if all[i] == me then
      here = true
      if tonumber(through) > tonumber(settled) then settled = through end
    elseif tonumber(at) + tonumber(its) + 500 < ms then
      call('HDEL', CONTROLLERS, all[i])
      append('g', all[i])
    else
      others[#others + 1], others[#others + 2] = all[i], through
    end
  end
  if not here then
    settled = int(counter('c'))
    append('j', me .. ' ' .. settled)
  end
  call('HSET', CONTROLLERS, me, int(ms) .. ' ' .. lease .. ' ' .. settled)
  if believed == '1' then call('SET', P .. 'warm', run, 'PX', 5000) end
  return {'ok', counter('n'), counter('c'), tonumber(settled), call('GET', P .. 'warm') == run and 1 or 0,
    call('SCARD', ROOMS), counter('users'), counter('count'), others}
end

if op == 'settled' then
  local me, through = unpack(ARGV, 4)
  local at, lease, before = string.match(call('HGET', CONTROLLERS, me) or '', '^(%d+) (%d+) (%d+)$')
  if at and tonumber(before) < tonumber(through) then
    call('HSET', CONTROLLERS, me, at .. ' ' .. lease .. ' ' .. through)
    append('s', me .. ' ' .. through)
  end
  return {'ok'}
end

if op == 'bye' then
  if call('HDEL', CONTROLLERS, ARGV[4]) == 1 then append('g', ARGV[4]) end
  return {'ok'}
end
return redis.error_reply('ERR unknown ' .. op)
