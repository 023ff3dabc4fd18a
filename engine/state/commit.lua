-- Applies what happened to one user, in order and as a whole. Runs on Redis 6 and later and on Valkey.
--
-- KEYS  recent actions, follows, dislikes, leftovers, cities, event ids, exposure bits of the current slice
-- ARGV  1: twelve u32: the most recent actions, follows, dislikes, leftovers, cities and event ids that are kept;
--          seconds that a user's state lives; seconds that a slice lives; planned, bits and hashes of a new slice
--          (planned 0: exposures are not kept here); 0
--       2: operations end to end: kind (1 byte), hash of the event's id (8, zeros: none), length (u32), payload
--       3: records of cities
-- Returns how many operations were left out because their event had been taken before.
--
-- Keys of ids are never read as numbers: Lua's have 53 bits. docs/state.md describes the records. What most calls need
-- stands in line: a function costs an object each time the script runs, a long string the hash of all its bytes.

local unpack_from, pack, find, sub, rep = struct.unpack, struct.pack, string.find, string.sub, string.rep
local call, floor, min, max = redis.call, math.floor, math.min, math.max

local RECORD, NO_ID, NO_KIND = 24, '\0\0\0\0\0\0\0\0', '\0\0\0\0'
local GONE = '\255\255\255\255'
local SHORT = 4096 -- bytes: a link of bits up to this length is read and written as a whole

local r_cap, f_cap, d_cap, c_cap, p_cap, i_cap, user_seconds, slice_seconds, planned, bits, hashes =
  unpack_from('<I4I4I4I4I4I4I4I4I4I4I4', ARGV[1])

-- What is kept beyond the cap before the oldest are dropped together: dropping costs a pass over all.
local function most(cap) return cap + max(4, floor(cap / 4)) end

-- The life of what is there is renewed when a 64th of it has gone by, not with every event. Event ids, which most users
-- have, are looked at first, so that one question is enough.
for at = 6, 1, -1 do
  local left = call('TTL', KEYS[at])
  if left ~= -2 then
    if left < user_seconds * 63 / 64 then
      for each = 1, 6 do call('EXPIRE', KEYS[each], user_seconds) end
    end
    break
  end
end

local function set(key, value, fresh)
  if fresh then call('SET', key, value, 'EX', user_seconds) else call('SET', key, value, 'KEEPTTL') end
end

-- Returns where `part` begins in `value`, at the beginning of a record of `size` bytes.
local function find_record(value, part, size)
  local at = find(value, part, 1, true)
  while at and (at - 1) % size ~= 0 do at = find(value, part, at + 1, true) end
  return at
end

-- Puts a record in the place of the one with the same key and kind unless that is newer, or behind the others.
local function put(key, cap, record)
  local value = call('GET', key)
  local fresh = value == false
  value = value or ''
  -- Behind the last record is room, all zeros.
  local room = #value / RECORD
  local n, high = 0, room
  while n < high do
    local middle = floor((n + high) / 2)
    if sub(value, middle * RECORD + 9, middle * RECORD + 12) == NO_KIND then high = middle else n = middle + 1 end
  end
  local place = find_record(value, sub(record, 1, 12), RECORD)
  if place then
    if unpack_from('<i8', record, 17) >= unpack_from('<i8', value, place + 16) then
      call('SETRANGE', key, place - 1, record)
    end
    return
  end
  if n < room then
    call('SETRANGE', key, n * RECORD, record)
    return
  end
  value, n = value .. record, n + 1
  if n <= most(cap) then
    room = min(most(cap), n + max(3, floor(n / 4)))
  else
    -- The newest stay, in their order; of one time the later ones are newer.
    local times, ordered, kept = {}, {}, {}
    for at = 1, n do
      local time = unpack_from('<i8', value, at * RECORD - 7)
      times[at], ordered[at] = time, time
    end
    table.sort(ordered)
    local limit, equal = ordered[n - cap], 0
    for at = n - cap, 1, -1 do
      if ordered[at] < limit then break end
      equal = equal + 1
    end
    for at = 1, n do
      if times[at] == limit and equal > 0 then
        equal = equal - 1
      elseif times[at] >= limit then
        kept[#kept + 1] = sub(value, at * RECORD - 23, at * RECORD)
      end
    end
    value, n, room = table.concat(kept), cap, most(cap)
  end
  set(key, value .. rep('\0', (room - n) * RECORD), fresh)
end

local left -- the leftovers, once they have been read

local function mark(place, kind)
  call('SETRANGE', KEYS[4], place + 7, kind)
  left = sub(left, 1, place + 7) .. kind .. sub(left, place + 12)
end

local ids, known, fresh
local probes, shown = {}, 0 -- two u32 per exposure; the bits are set at the end, together
local duplicates, operations, at = 0, ARGV[2], 1
while at <= #operations do
  local kind, id, length = unpack_from('<Bc8I4', operations, at)
  local first = at + 13
  at = first + length
  local taken = false
  if id ~= NO_ID and i_cap > 0 then
    if not ids then ids, known, fresh = call('GET', KEYS[6]) or '', {}, {} end
    taken = known[id] or find_record(ids, id, 8)
    if not taken then
      known[id] = true
      fresh[#fresh + 1] = id
    end
  end
  if taken then
    duplicates = duplicates + 1
  elseif kind == 6 then -- shown: gone from the leftovers, and a mark in the bits
    left = left or call('GET', KEYS[4]) or ''
    for each = first, at - 1, 16 do
      if left ~= '' then
        local place = find_record(left, sub(operations, each + 8, each + 15), RECORD)
        if place then mark(place, GONE) end
      end
      shown = shown + 1
      probes[2 * shown - 1], probes[2 * shown] = unpack_from('<I4I4', operations, each)
    end
  elseif kind == 1 then
    put(KEYS[1], r_cap, sub(operations, first, at - 1))
  elseif kind == 2 then
    put(KEYS[2], f_cap, sub(operations, first, at - 1))
  elseif kind == 3 then
    put(KEYS[3], d_cap, sub(operations, first, at - 1))
  elseif kind == 4 then -- left over: in front of those of before, an item once
    local old = left or call('GET', KEYS[4]) or ''
    local kept, there = {}, {}
    for each = first, min(at, first + c_cap * RECORD) - 1, RECORD do
      there[sub(operations, each, each + 7)] = true
      kept[#kept + 1] = sub(operations, each, each + 23)
    end
    for each = 1, #old, RECORD do
      if #kept == c_cap then break end
      if not there[sub(old, each, each + 7)] and sub(old, each + 8, each + 11) ~= GONE then
        kept[#kept + 1] = sub(old, each, each + 23)
      end
    end
    left = old
    if #kept > 0 then
      left = table.concat(kept)
      set(KEYS[4], left, old == '')
    end
  else -- leftovers were recalled once more
    left = left or call('GET', KEYS[4]) or ''
    for each = first, at - 1, 8 do
      local place = find_record(left, sub(operations, each, each + 7), RECORD)
      if place then
        local count = unpack_from('<I4', left, place + 8)
        if count < 4294967294 then mark(place, pack('<I4', count + 1)) end
      end
    end
  end
end

for city = 1, #ARGV[3], RECORD do put(KEYS[5], p_cap, sub(ARGV[3], city, city + 23)) end

if fresh and #fresh > 0 then
  -- Behind the last id are zeros; an id may end with some.
  local free = find(ids, NO_ID, 1, true)
  local n = free and math.ceil((free - 1) / 8) or #ids / 8
  local new = table.concat(fresh)
  if n + #fresh <= #ids / 8 then
    call('SETRANGE', KEYS[6], n * 8, new)
  else
    local value, room = sub(ids, 1, n * 8) .. new, most(i_cap)
    n = n + #fresh
    if n > room then
      value, n = sub(value, -8 * i_cap), i_cap
    else
      room = min(room, n + max(3, floor(n / 4)))
    end
    set(KEYS[6], value .. rep('\0', (room - n) * 8), ids == '')
  end
end

if shown == 0 or planned == 0 then return duplicates end

-- The bits: docs/exposure-format.md.
local key, band, bor = KEYS[7], bit.band, bit.bor
local value = call('GETRANGE', key, 0, 15 + SHORT)
local k, per, plan, count, links = hashes, bits, planned, 0, 1
if value ~= '' then
  local version = 0
  if #value >= 16 then version, k, per, plan, count, links = unpack_from('<BBI2I4I4I4', value) end
  local cells = plan * per
  if version ~= 1 or k < 1 or k > 16 or cells < 1 or cells > 1048576 or links < 1
      or (links > 16 and links > 16 + call('STRLEN', key) / 131072) then
    return redis.error_reply('ERR exposure bits that are damaged or of an unknown version')
  end
end

-- Of the newest link: its bits, the byte of the value at which it begins, how many exposures it takes, and of a short
-- one its content, behind `skip` other bytes, and what has changed in it (byte -> new byte).
local first_size = 64 * math.ceil(plan * per / 64)
local size, base, capacity = first_size, 16, plan
local function next_link(number)
  base = base + size / 8
  size = min(first_size * 2 ^ min(number - 1, 32), max(first_size, 1048576))
  capacity = max(1, floor(size / (2 * per)))
end
for number = 2, links do next_link(number) end
local fresh_slice = value == ''
local link, skip, changes
if size <= 8 * SHORT then
  link, skip, changes = value, 16, {}
  if fresh_slice then
    link = NO_ID .. NO_ID
  elseif links > 1 then
    link, skip = call('GETRANGE', key, base, base + size / 8 - 1), 0
  end
  -- Zeros at the end need not be there. At their full length values do not grow in place, which takes twice the memory.
  local missing = skip + size / 8 - #link
  if missing > 0 then link = link .. rep(NO_ID, floor(missing / 8)) .. rep('\0', missing % 8) end
end
if fresh_slice and not link then
  call('SET', key, pack('<BBI2I4I4I4', 1, k, per, plan, 0, 1) .. rep(NO_ID, size / 64), 'EX', slice_seconds)
  fresh_slice = false
end

local function write_link()
  local places, parts, done = {}, {}, skip
  for place in pairs(changes) do places[#places + 1] = place end
  if #places == 0 then return end
  table.sort(places)
  for at, place in ipairs(places) do
    parts[2 * at - 1] = sub(link, done + 1, place)
    parts[2 * at] = string.char(changes[place])
    done = place + 1
  end
  parts[#parts + 1] = sub(link, done + 1)
  local content = table.concat(parts)
  if fresh_slice then
    call('SET', key, pack('<BBI2I4I4I4', 1, k, per, plan, 0, 1) .. content, 'EX', slice_seconds)
    fresh_slice = false
  else
    call('SETRANGE', key, base, content)
  end
end

-- Whether all bits of an exposure are set in the newest link; where `write` says so they are afterwards.
local masks, byte = {[0] = 128, 64, 32, 16, 8, 4, 2, 1}, string.byte
local function all_set(each, write)
  local a, b, all = probes[2 * each - 1], probes[2 * each], true
  for i = 0, k - 1 do
    local place = ((a + i * b + i * i * 2654435769) % 4294967296) * size / 4294967296
    place = place - place % 1
    if link then
      local mask = masks[place % 8]
      local at = skip + (place - place % 8) / 8
      local old = changes[at] or byte(link, at + 1)
      if old % (2 * mask) < mask then
        all = false
        if write then changes[at] = old + mask end
      end
    elseif write then
      if call('SETBIT', key, base * 8 + place, 1) == 0 then all = false end
    elseif call('GETBIT', key, base * 8 + place) == 0 then
      all = false
    end
  end
  return all
end

local had, had_links, each = count, links, 1
while each <= shown do
  if count < capacity then
    if not all_set(each, true) then count = count + 1 end
    each = each + 1
  elseif all_set(each, false) then
    each = each + 1
  else -- full: this exposure opens the next link
    if link then write_link() end
    links, count = links + 1, 0
    next_link(links)
    value = call('GET', key)
    call('SET', key, value .. rep('\0', base + size / 8 - #value), 'KEEPTTL')
    link, skip, changes = nil, 0, {}
    if size <= 8 * SHORT then link = rep(NO_ID, size / 64) end
  end
end
if link then write_link() end
if count ~= had or links ~= had_links then call('SETRANGE', key, 8, pack('<I4I4', count, links)) end
return duplicates
